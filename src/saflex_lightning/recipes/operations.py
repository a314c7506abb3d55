"""Which operation made an augmented image, for torchvision's automatic augmentations."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["TagOperations", "TaggedImage", "group_names_of"]

_IDENTITY = "Identity"
_TYPES = (v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide)


class TaggedImage(NamedTuple):
    """One augmented image and what made it.

    Attributes:
        image: What the plain transform returns.
        group: Position in `TagOperations.group_names`, at least 1.
        magnitude: Of the operation that names the group, signed, in torchvision's unit of that
            operation (degrees, pixels, bits, factor); 0 for operations without a strength.
        operations: Every (name, magnitude) that was applied, in order.
    """

    image: Tensor
    group: int
    magnitude: float
    operations: tuple[tuple[str, float], ...]


class TagOperations:
    """Apply RandAugment, TrivialAugment or AutoAugment and tell which operation was drawn.

    Pixels, and the random state afterwards, are those of the plain transform. Where an image gets
    several operations, its group is that of one of them, each as likely, the identity left out:
    pairs would be too many groups to gather evidence about, and the last operation alone would
    never blame some of AutoAugment's. `TaggedImage.operations` has all of them for another rule.

    Args:
        transform: ``v2.RandAugment``, ``v2.TrivialAugmentWide`` or ``v2.AutoAugment``.

    Raises:
        TypeError: If the transform is of another type.

    Example:
        >>> tagged = TagOperations(v2.RandAugment(num_ops=1))
        >>> tagged.group_names[:4]
        ('clean', 'Identity', 'ShearX', 'ShearY')
    """

    def __init__(self, transform: v2.Transform) -> None:
        if not isinstance(transform, _TYPES):
            raise TypeError(
                "Expected `transform` to be one of "
                + ", ".join(f"`v2.{kind.__name__}`" for kind in _TYPES)
                + f", but got `{type(transform).__name__}`. Other transforms need no tags: give "
                "all of their images group 1."
            )
        self.transform = transform
        drawn = (
            {name for policy in transform._policies for name, *_ in policy}
            if isinstance(transform, v2.AutoAugment)
            else transform._AUGMENTATION_SPACE
        )
        known = [name for name in transform._AUGMENTATION_SPACE if name in drawn]
        self.group_names = tuple(dict.fromkeys(["clean", _IDENTITY, *known]))

    def __call__(self, image: Tensor) -> TaggedImage:
        """Return the augmented image with its tags.

        Args:
            image: ``(channels, height, width)`` uint8.
        """
        apply: Any = self.transform._apply_image_or_video_transform
        applied: list[tuple[str, float]] = []

        def record(image: Any, name: str, magnitude: float, *args: Any, **kwargs: Any) -> Any:
            applied.append((name, magnitude))
            return apply(image, name, magnitude, *args, **kwargs)

        # torchvision has no public way to see what it draws. The method is put back at once, so
        # that the transform stays one that can be pickled for loader workers.
        vars(self.transform)["_apply_image_or_video_transform"] = record
        try:
            augmented = self.transform(image)
        finally:
            del vars(self.transform)["_apply_image_or_video_transform"]
        name, magnitude = _choose([entry for entry in applied if entry[0] != _IDENTITY])
        return TaggedImage(augmented, self.group_names.index(name), magnitude, tuple(applied))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"


def _choose(operations: list[tuple[str, float]]) -> tuple[str, float]:
    """Return one of the operations, drawn evenly without moving the random state along."""
    if len(operations) < 2:
        return operations[0] if operations else (_IDENTITY, 0.0)
    with torch.random.fork_rng(devices=[]):
        return operations[int(torch.randint(len(operations), ()))]


def group_names_of(augmentation: object) -> tuple[str, ...]:
    """Return the name of every value of ``AugmentedBatch.group`` that an augmentation can give.

    Args:
        augmentation: A `TagOperations`, any other transform (one group, named by its type), or
            None.
    """
    if augmentation is None:
        return ("clean",)
    if isinstance(augmentation, TagOperations):
        return augmentation.group_names
    return ("clean", type(augmentation).__name__)
