"""Ready-made data and models; they use the public interface alone, as a user would."""

from saflex_lightning.recipes.classifier import Classifier
from saflex_lightning.recipes.data import MedMNISTDataModule
from saflex_lightning.recipes.generated import GeneratedDataModule
from saflex_lightning.recipes.resnet import ResNet18
from saflex_lightning.recipes.resnet50 import ResNet50
from saflex_lightning.recipes.small_cnn import SmallCNN
from saflex_lightning.recipes.tabular import SAINT, TabularDataModule, TabularMLP

__all__ = [
    "SAINT",
    "Classifier",
    "GeneratedDataModule",
    "MedMNISTDataModule",
    "ResNet18",
    "ResNet50",
    "SmallCNN",
    "TabularDataModule",
    "TabularMLP",
]
