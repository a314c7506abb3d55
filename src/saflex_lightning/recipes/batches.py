"""Training rows, their upstream augmentation, and how they become an `AugmentedBatch`."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.augment import (
    AugmentedImage,
    BatchMixing,
    ImageAugmentation,
    seeded_draws,
)
from saflex_lightning.recipes.medmnist import Split
from saflex_lightning.recipes.mixing import mixing_group
from saflex_lightning.recipes.resumable import ResumableSampler

__all__ = [
    "AugmentedImages",
    "CleanImages",
    "EpochSampler",
    "collate_rows",
    "epoch_and_row",
    "normalize",
]


def normalize(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1] (mean 0.5, standard deviation 0.5)."""
    return images.float().div(127.5).sub(1.0)


class TrainingRow(NamedTuple):
    """One training image before collation; ``augmented`` is None without an augmentation."""

    epoch: int
    row: int
    target: int
    clean: Tensor
    augmented: AugmentedImage | None


class AugmentedImages(Dataset[TrainingRow]):
    """Training images, each augmented by random draws that depend on (seed, epoch, row) alone.

    Neither the order of the batches, the number of workers nor what the training does with the
    global random state changes an augmented image, so runs with and without SAFLEX see the same
    ones. Items are addressed by ``(epoch, row)`` (see `EpochSampler`).
    """

    def __init__(self, rows: Split, augmentation: ImageAugmentation | None, seed: int) -> None:
        self.rows = rows
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows.target)

    def __getitem__(self, key: tuple[int, int] | int) -> TrainingRow:
        epoch, row = epoch_and_row(key)
        clean, target = self.rows.images[row], int(self.rows.target[row])
        augmented = None
        if self.augmentation is not None:
            with seeded_draws(self.seed, epoch, row):
                augmented = self.augmentation(clean, target)
            if augmented.image.shape != clean.shape:
                raise ValueError(
                    f"Expected an augmentation that keeps the shape {tuple(clean.shape)} of the "
                    f"images, but it made {tuple(augmented.image.shape)}. Set `size` in "
                    "`augmentation_settings` to the side of the images."
                )
        return TrainingRow(epoch, row, target, clean, augmented)


def epoch_and_row(key: tuple[int, int] | int) -> tuple[int, int]:
    """Return a key of `EpochSampler` as it is, and a plain row number as one of epoch 0.

    Lightning's ``overfit_batches`` puts a sampler of plain row numbers in the place of ours.

    Args:
        key: What a sampler yielded.
    """
    return key if isinstance(key, tuple) else (0, key)


class EpochSampler(ResumableSampler):
    """Shuffled ``(epoch, row)`` pairs: the epoch reaches the dataset, in loader workers too."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, row) for row in super().__iter__())


class CleanImages(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images and labels without augmentation."""

    def __init__(self, rows: Split) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.target)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return normalize(self.rows.images[row]), self.rows.target[row]


class _Rows(NamedTuple):
    """Augmented rows of a batch: normalised images, targets and groups."""

    inputs: Tensor
    target: Tensor
    group: Tensor


def collate_rows(
    rows: list[TrainingRow],
    *,
    batch: Literal["union", "replace"],
    num_rows: int,
    mixing: BatchMixing | None = None,
    seed: int = 0,
) -> AugmentedBatch:
    """Make an `AugmentedBatch` of normalised images.

    ``"union"`` puts one augmented row per clean row behind the clean rows (Ding et al. 2024,
    Eq. 3); ``"replace"`` keeps the augmented rows alone. Rows without an augmented version stay
    clean in both. The target is one of class probabilities where any row has such a label.

    Args:
        rows: Rows of one batch.
        batch: Which rows to keep.
        num_rows: Number of training rows; the index of an augmented row is that of its clean row
            plus this.
        mixing: Mixes the clean rows with one another to make the augmented ones, by draws that
            depend on the seed, the epoch and the first row alone; None takes each row's own.
        seed: Seed of the mixing.
    """
    size = len(rows)
    clean = normalize(torch.stack([row.clean for row in rows]))
    target = torch.tensor([row.target for row in rows])
    index = torch.tensor([row.row for row in rows])
    none = torch.full_like(index, -1)
    if mixing is not None:
        with seeded_draws(seed, rows[0].epoch, rows[0].row):
            images, mixed = mixing(clean, target)
        augmented = _Rows(images, mixed, _group_of_mixed(mixed, target))
    else:
        augmented = _stack([row.augmented for row in rows if row.augmented is not None], target)
    if augmented is None:
        return AugmentedBatch(clean, target, index < 0, index * 0, index, none)
    if batch == "replace":
        return AugmentedBatch(
            augmented.inputs,
            augmented.target,
            torch.ones_like(index, dtype=torch.bool),
            augmented.group,
            index + num_rows,
            none,
        )
    if augmented.target.ndim == 2:
        target = F.one_hot(target, augmented.target.shape[-1]).to(augmented.target)
    return AugmentedBatch(
        inputs=torch.cat([clean, augmented.inputs]),
        target=torch.cat([target, augmented.target]),
        augmented=torch.arange(2 * size) >= size,
        group=torch.cat([index * 0, augmented.group]),
        index=torch.cat([index, index + num_rows]),
        source=torch.cat([none, torch.arange(size)]),
    )


def _stack(made: list[AugmentedImage], target: Tensor) -> _Rows | None:
    if not made:
        return None
    soft = [image.target for image in made if image.target is not None]
    return _Rows(
        normalize(torch.stack([image.image for image in made])),
        torch.stack(soft) if soft else target,
        torch.tensor([image.group for image in made]),
    )


def _group_of_mixed(mixed: Tensor, target: Tensor) -> Tensor:
    # One share is drawn for the whole batch; it shows wherever two classes were mixed.
    kept = mixed.gather(-1, target.unsqueeze(-1)).min()
    return mixing_group(kept.expand(len(target)))
