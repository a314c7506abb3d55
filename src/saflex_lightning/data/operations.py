"""Which operation made an image, for the automatic augmentations of torchvision and timm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torchvision.transforms import autoaugment as v1
from torchvision.transforms import v2

__all__ = ["TagOperations", "TaggedImage", "can_be_tagged"]

_IDENTITY = "Identity"
_V1 = (v1.AutoAugment, v1.RandAugment, v1.TrivialAugmentWide)
_V2 = (v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide)


class TaggedImage(NamedTuple):
    """One augmented image and what made it.

    Attributes:
        image: What the plain transform returns.
        group: Position in `TagOperations.group_names`, at least 1.
        magnitude: Of the operation that names the group, signed, in the library's unit of that
            operation (degrees, pixels, bits, factor); 0 for operations without a strength.
        operations: Every (name, magnitude) that was applied, in order.
    """

    image: Any
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
        transform: One of those of ``torchvision.transforms.v2``, of ``torchvision.transforms`` or
            of timm (RandAugment, AutoAugment), or a ``Compose`` that holds one.

    Raises:
        TypeError: If the transform is none of them.

    Example:
        >>> tagged = TagOperations(v2.RandAugment(num_ops=1))
        >>> tagged.group_names[:4]
        ('clean', 'Identity', 'ShearX', 'ShearY')
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        part = _find_part(transform)
        if part is None:
            names = sorted({kind.__name__ for kind in (*_V1, *_V2)})
            raise TypeError(
                f"Expected `transform` to be one of {names} of torchvision, one of timm's, or a "
                f"`Compose` that holds one, but got `{type(transform).__name__}`. Other transforms "
                "need no tags: give all of their images group 1."
            )
        self.transform = transform
        self._part = part
        self.group_names = tuple(dict.fromkeys(["clean", _IDENTITY, *_names_of(part)]))

    def __call__(self, image: Any) -> TaggedImage:
        """Return the augmented image with its tags.

        Args:
            image: What the transform takes.
        """
        applied: list[tuple[str, float]] = []
        with _recorded(self._part, applied):
            augmented = self.transform(image)
        name, magnitude = _choose([entry for entry in applied if entry[0] != _IDENTITY])
        return TaggedImage(augmented, self.group_names.index(name), magnitude, tuple(applied))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"


def can_be_tagged(transform: object) -> bool:
    """Say whether `TagOperations` takes a transform."""
    return _find_part(transform) is not None


def _find_part(transform: object) -> Any | None:
    """Return the transform that draws operations: the given one, or the first inside a Compose."""
    if isinstance(transform, (*_V1, *_V2)) or _timm_operations(transform):
        return transform
    parts = getattr(transform, "transforms", None)
    if type(transform).__name__ != "Compose" or not isinstance(parts, (list, tuple)):
        return None
    return next((found for part in parts if (found := _find_part(part)) is not None), None)


def _timm_operations(transform: object) -> list[Any]:
    """Return the operations of timm's RandAugment or AutoAugment; none for anything else."""
    if type(transform).__module__ != "timm.data.auto_augment":
        return []
    kept: Any = transform
    policies = {"RandAugment": lambda: [kept.ops], "AutoAugment": lambda: kept.policy}
    read = policies.get(type(transform).__name__)
    return [operation for policy in (read() if read else ()) for operation in policy]


def _names_of(part: Any) -> list[str]:
    """Return the names of a transform's operations, in the order of its library."""
    if operations := _timm_operations(part):
        return [operation.name for operation in operations]
    if isinstance(part, _V2):
        space = list(part._AUGMENTATION_SPACE)
        policies = getattr(part, "_policies", None)
    else:
        size = () if isinstance(part, v1.TrivialAugmentWide) else ((8, 8),)
        space = list(part._augmentation_space(10, *size))
        policies = getattr(part, "policies", None)
    drawn = space if policies is None else {name for policy in policies for name, *_ in policy}
    return [name for name in space if name in drawn]


@contextmanager
def _recorded(part: Any, applied: list[tuple[str, float]]) -> Iterator[None]:
    """Note the name and the magnitude of every operation that is applied meanwhile.

    None of the libraries has a public way to see what it draws. What is replaced is put back at
    once, so that the transform stays one that can be pickled for loader workers.
    """

    def noting(apply: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        def note(image: Any, *args: Any, **kwargs: Any) -> Any:
            if name is None:  # torchvision's are called with it
                applied.append((args[0], float(args[1])))
            else:
                number = args[0] if args and isinstance(args[0], (int, float)) else 0.0
                applied.append((name, float(number)))
            return apply(image, *args, **kwargs)

        return note

    if operations := _timm_operations(part):
        places = [(operation, "aug_fn", operation.name) for operation in operations]
    elif isinstance(part, _V2):
        places = [(part, "_apply_image_or_video_transform", None)]
    else:
        places = [(v1, "_apply_op", None)]
    kept = [vars(owner).get(attribute) for owner, attribute, _ in places]
    for owner, attribute, name in places:
        setattr(owner, attribute, noting(getattr(owner, attribute), name))
    try:
        yield
    finally:
        for (owner, attribute, _), value in zip(places, kept, strict=True):
            if value is None:
                delattr(owner, attribute)  # the class has it
            else:
                setattr(owner, attribute, value)


def _choose(operations: list[tuple[str, float]]) -> tuple[str, float]:
    """Return one of the operations, drawn evenly without moving the random state along."""
    if len(operations) < 2:
        return operations[0] if operations else (_IDENTITY, 0.0)
    with torch.random.fork_rng(devices=[]):
        return operations[int(torch.randint(len(operations), ()))]
