"""Augmentations of albumentations, which draw from generators of their own."""

from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["FromGlobalDraws", "has_own_draws"]


def has_own_draws(augment: object) -> bool:
    """Say whether an augmentation is one of albumentations, alone or composed."""
    return type(augment).__module__.partition(".")[0] == "albumentations"


class FromGlobalDraws:
    """Call a transform of albumentations as one of torchvision, from an image to an image.

    Its draws are made a function of torch's global generator, as those of other libraries are.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.group_names = ("clean", type(transform).__name__)

    def __call__(self, image: Any) -> Any:
        """Return the augmented image: a picture where it was one, else what the transform makes."""
        seed = int(torch.randint(2**31, ()))
        if hasattr(self.transform, "set_random_seed"):  # early releases draw from global ones
            self.transform.set_random_seed(seed)
        made = self.transform(image=np.asarray(image))["image"]
        is_picture = isinstance(image, Image.Image) and isinstance(made, np.ndarray)
        return Image.fromarray(made) if is_picture else made
