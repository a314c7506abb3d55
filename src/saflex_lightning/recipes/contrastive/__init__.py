"""Image-text and self-supervised contrastive training, with the public interface alone."""

from saflex_lightning.recipes.contrastive.encoders import ImageTextEncoders, OpenClipEncoders
from saflex_lightning.recipes.contrastive.metrics import MacroF1
from saflex_lightning.recipes.contrastive.tuner import ContrastiveTuner

__all__ = ["ContrastiveTuner", "ImageTextEncoders", "MacroF1", "OpenClipEncoders"]
