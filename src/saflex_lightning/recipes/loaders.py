"""The loaders of the datamodules."""

from collections.abc import Callable, Sized
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.augment import BatchMixing, ImageAugmentation
from saflex_lightning.recipes.batches import (
    AugmentedImages,
    EpochSampler,
    collate_rows,
)
from saflex_lightning.recipes.data_checks import check_batch_size
from saflex_lightning.recipes.medmnist import Split
from saflex_lightning.recipes.resumable import ResumableLoader

__all__ = [
    "SteeringName",
    "loader_options",
    "make_image_loader",
    "make_train_loader",
    "mix_seeds",
    "process_share",
]

SteeringName = Literal["val", "split", "train"]


def process_share(trainer: L.Trainer | None) -> dict[str, int]:
    """Return how many processes there are and which this is, as a distributed sampler takes it.

    Args:
        trainer: The Trainer; None, or one process, shares nothing out.
    """
    given = (trainer and trainer.distributed_sampler_kwargs) or {}
    return {"num_replicas": given.get("num_replicas", 1), "rank": given.get("rank", 0)}


def loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    """Return what every loader of a datamodule is made with.

    Args:
        num_workers: Loader processes; they persist.
        seed: Seed of the loader's own generator.
    """
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        # Otherwise each pass over a loader draws from the global random state.
        "generator": torch.Generator().manual_seed(seed),
    }


def mix_seeds(*numbers: int) -> int:
    """Return one seed made from several non-negative numbers, such as (seed, epoch).

    Args:
        *numbers: Integers.

    Returns:
        A number in [0, 2**32), far from those of neighbouring numbers.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    trainer: L.Trainer | None,
    seed: int,
    num_workers: int,
    collate_fn: Callable[[list[Any]], Any],
) -> DataLoader[Any]:
    """Return a loader of training batches whose order is a function of seed and epoch.

    It resumes in the middle of an epoch. The last, smaller batch is left out: its rows come in
    other epochs, and every step has the same size.

    Args:
        dataset: Rows by ``(epoch, row)``.
        batch_size: Rows per step and process.
        trainer: As for `process_share`.
        seed: Seed of the order.
        num_workers: Loader processes.
        collate_fn: Makes a batch.

    Raises:
        ValueError: If a process has fewer rows than a batch.
    """
    share = process_share(trainer)
    sampler = EpochSampler(
        cast("Sized", dataset),
        num_replicas=share["num_replicas"],
        rank=share["rank"],
        seed=mix_seeds(seed),  # it adds the epoch: keep the orders of neighbouring seeds apart
    )
    check_batch_size(batch_size, len(sampler))
    return ResumableLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=True,
        **loader_options(num_workers, seed),
    )


def make_image_loader(
    rows: Split,
    augment: ImageAugmentation | None,
    mixing: BatchMixing | None,
    *,
    batch: Literal["union", "replace"],
    batch_size: int,
    trainer: L.Trainer | None,
    seed: int,
    num_workers: int,
) -> DataLoader[AugmentedBatch]:
    """Return a loader of training images with their augmented versions.

    Args:
        rows: Training images.
        augment: Augments one image; None where a batch is mixed, or left clean.
        mixing: See `collate_rows`.
        batch: See `collate_rows`.
        batch_size: See `make_train_loader`, as for the arguments that follow.
        trainer: See `make_train_loader`.
        seed: Seed of the order and of the augmentation.
        num_workers: See `make_train_loader`.
    """
    dataset = AugmentedImages(rows, augment, seed)
    collate = partial(collate_rows, batch=batch, num_rows=len(dataset), mixing=mixing, seed=seed)
    return make_train_loader(
        dataset,
        batch_size,
        trainer=trainer,
        seed=seed,
        num_workers=num_workers,
        collate_fn=collate,
    )
