"""Images with labels: rows of the image datamodules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["ImageRows", "Split", "normalize", "stack_normalized"]


def normalize(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1] (mean 0.5, standard deviation 0.5)."""
    return images.float().div(127.5).sub(1.0)


class Split(NamedTuple):
    """Images and labels of one split.

    Attributes:
        images: ``(n, channels, height, width)`` uint8, or a sequence of such images with the
            methods ``take`` and ``join``, as `FileImages` has them.
        target: ``(n,)`` int64.
    """

    images: Any
    target: Tensor

    def take(self, rows: Tensor) -> "Split":
        """Return some rows, in the order asked for."""
        in_memory = isinstance(self.images, Tensor)
        images = self.images[rows] if in_memory else self.images.take(rows.tolist())
        return Split(images, self.target[rows])

    def join(self, other: "Split") -> "Split":
        """Return these rows and those of another split behind them."""
        in_memory = isinstance(self.images, Tensor)
        images = [self.images, other.images]
        joined = torch.cat(images) if in_memory else self.images.join(other.images)
        return Split(joined, torch.cat([self.target, other.target]))


class ImageRows(Dataset[tuple[Tensor, Tensor]]):
    """Images, as they are or normalised, and labels."""

    is_random = False  # see `UnionDataset`

    def __init__(self, rows: Split, *, normalized: bool = True) -> None:
        self.rows = rows
        self.normalized = normalized

    @property
    def target(self) -> Tensor:
        """Labels, ``(n,)`` int64."""
        return self.rows.target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = self.rows.images[row]
        return normalize(image) if self.normalized else image, self.target[row]


def stack_normalized(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return images of a batch, normalised all at once, and labels; a collate function."""
    images, target = zip(*rows, strict=True)
    return normalize(torch.stack(images)), torch.stack(target)
