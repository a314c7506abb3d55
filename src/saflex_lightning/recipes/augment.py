"""Upstream augmentations by name, and what they make of an image.

Most augment one image (`AugmentedImage`); Mixup and CutMix mix the images of a batch. Adding one is
one line in one of the two tables.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from saflex_lightning.recipes.mixing import mixing_group_names
from saflex_lightning.recipes.operations import TaggedImage, TagOperations, group_names_of
from saflex_lightning.recipes.soft_crop import SoftCrop

__all__ = [
    "AugmentationName",
    "AugmentedImage",
    "BatchMixing",
    "ImageAugmentation",
    "augmentation_group_names",
    "make_image_augmentation",
    "make_mixing",
    "seeded_draws",
]

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


class AugmentedImage(NamedTuple):
    """What an upstream augmentation makes of one image.

    Attributes:
        image: ``(channels, height, width)`` uint8.
        group: What made it, from 1 (0 means clean); see `augmentation_group_names`.
        target: ``(classes,)`` float32; None keeps the label of the image. An augmentation gives
            one for every image or for none.
    """

    image: Tensor
    group: int = 1
    target: Tensor | None = None


ImageAugmentation = Callable[[Tensor, int], AugmentedImage]
BatchMixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_image_augmentation(
    name: AugmentationName, num_classes: int, settings: Mapping[str, Any]
) -> ImageAugmentation | None:
    """Return the augmentation of one image and its label, or None where the name has none.

    Args:
        name: An augmentation.
        num_classes: Number of classes.
        settings: Keyword values of the transform.

    Returns:
        A function that draws from torch's global generator, see `seeded_draws`.

    Raises:
        TypeError: If a setting is unknown.
    """
    if name == "soft_crop":
        return partial(_soften, _build(partial(SoftCrop, num_classes), name, settings))
    if name in _TRANSFORMS:
        return partial(_transform, _build(_TRANSFORMS[name], name, settings))
    return None


def make_mixing(
    name: AugmentationName, num_classes: int, settings: Mapping[str, Any]
) -> BatchMixing | None:
    """Return the augmentation that mixes a batch and its labels, or None where the name has none.

    Args:
        name: An augmentation.
        num_classes: Number of classes.
        settings: Keyword values of the transform.

    Returns:
        A function of float images ``(batch, channels, height, width)`` and labels ``(batch,)`` that
        draws from torch's global generator and returns soft labels ``(batch, classes)``.

    Raises:
        TypeError: If a setting is unknown.
    """
    if name in _MIXINGS:
        return _build(partial(_MIXINGS[name], num_classes=num_classes), name, settings)
    return None


def augmentation_group_names(
    name: AugmentationName, settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return what each value of ``AugmentedBatch.group`` stands for.

    Args:
        name: An augmentation.
        settings: Keyword values of the transform.
    """
    if name == "none":
        return ("clean",)
    if name in _MIXINGS:
        return mixing_group_names(name)
    if name in _TRANSFORMS:
        return group_names_of(_build(_TRANSFORMS[name], name, settings))
    return ("clean", name)


def _tagged(make: Callable[..., v2.Transform]) -> Callable[..., TagOperations]:
    return lambda **settings: TagOperations(make(**settings))


def _auto_augment(policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet") -> v2.Transform:
    return v2.AutoAugment(v2.AutoAugmentPolicy(policy))


_TRANSFORMS: Mapping[str, Callable[..., v2.Transform | TagOperations]] = MappingProxyType(
    {
        "randaugment": _tagged(v2.RandAugment),
        "trivialaugment": _tagged(v2.TrivialAugmentWide),
        "autoaugment": _tagged(_auto_augment),
        "augmix": v2.AugMix,
        "crop": v2.RandomCrop,
    }
)
_MIXINGS: Mapping[str, Callable[..., v2.Transform]] = MappingProxyType(
    {"mixup": v2.MixUp, "cutmix": v2.CutMix}
)


def _transform(
    transform: v2.Transform | TagOperations, image: Tensor, label: int
) -> AugmentedImage:
    made = transform(image)
    if isinstance(made, TaggedImage):
        return AugmentedImage(made.image, made.group)
    return AugmentedImage(made)


def _soften(crop: SoftCrop, image: Tensor, label: int) -> AugmentedImage:
    image, target = crop(image, label)
    return AugmentedImage(image, target=target)


def _build(make: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> Any:
    try:
        return make(**settings)
    except TypeError as error:
        raise TypeError(
            f"Expected `augmentation_settings` to fit '{name}', but got {dict(settings)} ({error})."
            " Pass keyword values of that transform alone."
        ) from error


@contextmanager
def seeded_draws(*key: int) -> Iterator[None]:
    """Make every draw from torch's global generator a function of some numbers alone.

    The generator's state and the number of threads are put back. One thread computes: sharing out
    an image of 28 pixels takes longer than augmenting it, and far longer (a factor of 40 was seen)
    while another process has one of the cores.

    Args:
        *key: Non-negative integers.
    """
    draw = np.random.SeedSequence(key).generate_state(1, np.uint64)
    threads = torch.get_num_threads()
    # The default generator is seeded by itself because torch.manual_seed would reseed the
    # accelerator's too.
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(int(draw[0]))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
