"""Upstream augmentations of images by name.

Most augment one image; Mixup and CutMix mix the images of a batch. `UnionDataset` makes the rows.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from saflex_lightning.data.checks import check
from saflex_lightning.data.draws import seeded_draws
from saflex_lightning.data.mixing import is_mixing
from saflex_lightning.recipes.soft_crop import SoftCrop

__all__ = ["AugmentationName", "check_augmentation", "make_augmentation"]

_SETTINGS = "augmentation_settings"
AugmentationName = Literal[
    "none",
    "randaugment",
    "trivialaugment",
    "autoaugment",
    "augmix",
    "crop",
    "soft_crop",
    "mixup",
    "cutmix",
]


def make_augmentation(
    name: AugmentationName, num_classes: int, settings: Mapping[str, Any]
) -> Callable[..., Any] | None:
    """Return an augmentation as `UnionDataset` takes it; None for ``"none"``.

    Args:
        name: An augmentation.
        num_classes: Number of classes, for those that change labels.
        settings: Keyword values of the transform.

    Raises:
        TypeError: If a setting is unknown.
    """
    if name == "none":
        return None
    make = _TRANSFORMS[name]
    if "num_classes" in signature(make).parameters:
        make = partial(make, num_classes=num_classes)
    return make(**settings)


def check_augmentation(
    name: AugmentationName, settings: Mapping[str, Any] | None, image: Tensor | None = None
) -> None:
    """Refuse settings that the transform does not have or cannot work with, before any worker does.

    Numbers are compared with the type of the transform's own default, and an image is augmented a
    few times.

    Args:
        name: An augmentation.
        settings: Keyword values of the transform.
        image: An image of the set; None takes a black one, to which no crop need fit.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a setting is unknown or of another type.
    """
    check("a mapping of names to values", optional=True, augmentation_settings=settings)
    settings = dict(settings or {})
    if name == "none":
        return
    parameters = signature(_TRANSFORMS[name]).parameters
    for setting, value in settings.items():
        if setting == "fill":
            for shade in value if isinstance(value, (list, tuple)) else [value]:
                check("a number in [0, 255]", optional=True, **{f"{_SETTINGS}.fill": shade})
        elif setting in parameters and setting != "interpolation":
            _check_value(f"{_SETTINGS}.{setting}", value, parameters[setting].default)
    try:
        augment = make_augmentation(name, 2, settings)
        if name != "crop" or image is not None:
            _try(augment, torch.zeros(3, 32, 32, dtype=torch.uint8) if image is None else image)
    except Exception as error:  # whatever the transform raises
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Expected `augmentation_settings` to fit '{name}', but got {settings} ({error}). Pass "
            "keyword values of that transform alone."
        ) from error


def _try(augment: Any, image: Tensor) -> None:
    """Augment an image a few times, since one draw may need a setting that another does not."""
    arguments: tuple[Any, ...] = (image,)
    if is_mixing(augment):
        arguments = (image[None].float(), torch.zeros(1, dtype=torch.int64))
    elif getattr(augment, "changes_label", False):
        arguments = (image, 0)
    for draw in range(8):
        with seeded_draws(draw):
            augment(*arguments)


def _check_value(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        check("True or False", **{name: value})
    elif isinstance(default, int) and default >= 0:  # below 0 stands for something else
        check("a non-negative integer", **{name: value})
    elif isinstance(default, float):
        check("a positive number", **{name: value})


def _auto_augment(policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet") -> v2.Transform:
    return v2.AutoAugment(v2.AutoAugmentPolicy(policy))


_TRANSFORMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "autoaugment": _auto_augment,
        "augmix": v2.AugMix,
        "crop": v2.RandomCrop,
        "soft_crop": SoftCrop,
        "mixup": v2.MixUp,
        "cutmix": v2.CutMix,
    }
)
