"""Image-text contrastive training, with the public interface alone."""

from saflex_lightning.recipes.contrastive.encoders import ImageTextEncoders, OpenClipEncoders
from saflex_lightning.recipes.contrastive.ensembling import WeightEnsembling
from saflex_lightning.recipes.contrastive.iwildcam import IWildCamDataModule
from saflex_lightning.recipes.contrastive.metrics import MacroF1
from saflex_lightning.recipes.contrastive.probe import FitHeadFirst, ImageTower, fit_linear_probe
from saflex_lightning.recipes.contrastive.tower_classifier import TowerClassifier
from saflex_lightning.recipes.contrastive.tuner import ContrastiveTuner

__all__ = [
    "ContrastiveTuner",
    "FitHeadFirst",
    "IWildCamDataModule",
    "ImageTextEncoders",
    "ImageTower",
    "MacroF1",
    "OpenClipEncoders",
    "TowerClassifier",
    "WeightEnsembling",
    "fit_linear_probe",
]
