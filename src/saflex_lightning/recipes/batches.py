"""Training rows, their upstream augmentation, and how they become an `AugmentedBatch`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision.transforms import v2

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.medmnist import Split
from saflex_lightning.recipes.operations import TaggedImage, TagOperations

__all__ = ["AugmentedImages", "CleanImages", "EpochSampler", "collate_rows", "normalize"]


def normalize(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1] (mean 0.5, standard deviation 0.5)."""
    return images.float().div(127.5).sub(1.0)


class TrainingRow(NamedTuple):
    """One training image before collation; ``augmented`` is None without an augmentation.

    ``group`` tells what made the augmented image: its operation, or 1 where that is not known.
    """

    row: int
    target: int
    clean: Tensor
    augmented: Tensor | None
    group: int = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in the calling thread.

    Sharing out an image of 28 pixels takes longer than augmenting it, and far longer (a factor of
    40 was seen) while another process has one of the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class AugmentedImages(Dataset[TrainingRow]):
    """Training images, each augmented by random draws that depend on (seed, epoch, row) alone.

    Neither the order of the batches, the number of workers nor what the training does with the
    global random state changes an augmented image, so runs with and without SAFLEX see the same
    ones. Items are addressed by ``(epoch, row)`` (see `EpochSampler`).
    """

    def __init__(
        self, rows: Split, augmentation: v2.Transform | TagOperations | None, seed: int
    ) -> None:
        self.rows = rows
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows.target)

    def __getitem__(self, key: tuple[int, int]) -> TrainingRow:
        epoch, row = key
        clean = self.rows.images[row]
        augmented, group = None, 1
        if self.augmentation is not None:
            draw = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1, np.uint64)
            # torchvision draws from the global generator; the default generator is seeded by
            # itself because torch.manual_seed would reseed the accelerator's too.
            with torch.random.fork_rng(devices=[]), one_thread():
                torch.default_generator.manual_seed(int(draw[0]))
                augmented = self.augmentation(clean)
            if isinstance(augmented, TaggedImage):
                augmented, group = augmented.image, augmented.group
        return TrainingRow(row, int(self.rows.target[row]), clean, augmented, group)


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Shuffled ``(epoch, row)`` pairs: the epoch reaches the dataset, in loader workers too."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = cast("Iterator[int]", super().__iter__())
        return ((self.epoch, row) for row in rows)


class CleanImages(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images and labels without augmentation."""

    def __init__(self, rows: Split) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.target)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return normalize(self.rows.images[row]), self.rows.target[row]


def collate_rows(
    rows: list[TrainingRow], *, batch: Literal["union", "replace"], num_rows: int
) -> AugmentedBatch:
    """Make an `AugmentedBatch` of normalised images.

    ``"union"`` puts one augmented row per clean row behind the clean rows (Ding et al. 2024,
    Eq. 3); ``"replace"`` keeps the augmented rows alone. Rows without an augmented version stay
    clean in both.

    Args:
        rows: Rows of one batch.
        batch: Which rows to keep.
        num_rows: Number of training rows; the index of an augmented row is that of its clean row
            plus this.
    """
    size = len(rows)
    clean = torch.stack([row.clean for row in rows])
    target = torch.tensor([row.target for row in rows])
    index = torch.tensor([row.row for row in rows])
    ones, none = torch.ones_like(index), torch.full_like(index, -1)
    made = [row.augmented for row in rows if row.augmented is not None]
    if not made:
        return AugmentedBatch(normalize(clean), target, ones < 0, ones * 0, index, none)
    augmented = torch.stack(made)
    group = torch.tensor([row.group for row in rows])
    if batch == "replace":
        return AugmentedBatch(normalize(augmented), target, ones > 0, group, index + num_rows, none)
    return AugmentedBatch(
        inputs=normalize(torch.cat([clean, augmented])),
        target=target.repeat(2),
        augmented=torch.arange(2 * size) >= size,
        group=torch.cat([ones * 0, group]),
        index=torch.cat([index, index + num_rows]),
        source=torch.cat([none, torch.arange(size)]),
    )
