"""The loaders of the datamodules, and the checks of the settings that they share."""

from collections.abc import Callable, Sized
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saflex_lightning.recipes.batches import EpochSampler
from saflex_lightning.recipes.resumable import ResumableLoader
from saflex_lightning.recipes.sampling import ClassBatchSampler

__all__ = [
    "SteeringDraw",
    "SteeringName",
    "check_batch_size",
    "check_merging",
    "check_shares",
    "check_sizes",
    "check_steering",
    "late_epoch",
    "loader_options",
    "make_steering_loader",
    "make_train_loader",
    "mix_seeds",
    "process_share",
]

SteeringDraw = Literal["plain", "stratified", "balanced"]
SteeringName = Literal["val", "split", "train", "late"]


def process_share(trainer: L.Trainer | None) -> dict[str, int]:
    """Return how many processes there are and which this is, as a distributed sampler takes it.

    Args:
        trainer: The Trainer; None, or one process, shares nothing out.
    """
    given = (trainer and trainer.distributed_sampler_kwargs) or {}
    return {"num_replicas": given.get("num_replicas", 1), "rank": given.get("rank", 0)}


def late_epoch(trainer: L.Trainer | None) -> int:
    """Return the first epoch of the second half of the training.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If it does not tell the number of epochs.
    """
    epochs = trainer and trainer.max_epochs
    if not epochs or epochs < 0:
        raise MisconfigurationException(
            "Expected the Trainer to tell the number of epochs for `steering`='late', whose "
            f"validation rows are trained on from half of them on, but got {epochs}. Pass "
            "`max_epochs`."
        )
    return -(-epochs // 2)


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
    num_late: int = 0,
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
        num_late: How many of the rows, the last ones, are drawn from half of the training on only;
            the steps of an epoch stay as many.

    Raises:
        ValueError: If a process has fewer rows than a batch.
        MisconfigurationException: If there are late rows and the number of epochs is not known.
    """
    share = process_share(trainer)
    sampler = EpochSampler(
        cast("Sized", dataset),
        num_replicas=share["num_replicas"],
        rank=share["rank"],
        seed=mix_seeds(seed),  # it adds the epoch: keep the orders of neighbouring seeds apart
        num_late=num_late,
        late_epoch=late_epoch(trainer) if num_late else 0,
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


def make_steering_loader(
    dataset: Dataset[Any],
    target: Tensor,
    *,
    draw: SteeringDraw,
    batch_size: int,
    plain_batch_size: int,
    trainer: L.Trainer | None,
    seed: int,
    num_workers: int,
) -> DataLoader[Any]:
    """Return a loader of the rows that steer SAFLEX.

    The callback draws from a plain loader in batches of its own size and order. The others are
    repeated as they are.

    Args:
        dataset: The rows.
        target: Their labels, ``(n,)`` int64.
        draw: ``"plain"``: in shuffled passes; ``"stratified"``: every batch has rows of every
            class, in shares like those of the data but at least one; ``"balanced"``: as many of
            each.
        batch_size: Rows of a stratified or balanced batch, per process.
        plain_batch_size: Rows of a plain one.
        trainer: As for `process_share`.
        seed: Seed of the order.
        num_workers: Loader processes.

    Raises:
        ValueError: If a stratified or balanced batch has fewer rows than there are classes, or a
            class has no row.
    """
    options = loader_options(num_workers, seed)
    if draw == "plain":
        return DataLoader(dataset, plain_batch_size, **options)
    share = process_share(trainer)
    sampler = ClassBatchSampler(
        target,
        batch_size,
        balanced=draw == "balanced",
        seed=seed,
        rank=share["rank"],
        world_size=share["num_replicas"],
    )
    return DataLoader(dataset, batch_sampler=sampler, **options)


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Refuse a batch larger than the rows of a process.

    Args:
        batch_size: Rows per step and process.
        num_rows: Training rows of one process.

    Raises:
        ValueError: If it is larger.
    """
    if num_rows < batch_size:
        raise ValueError(
            f"Expected `batch_size` to be at most {num_rows}, the training rows of one process, "
            f"but got {batch_size}. Pass a smaller `batch_size`."
        )


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Args:
        **sizes: By the name of their setting.

    Raises:
        ValueError: If one is less than 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"Expected `{name}` to be at least 1, but got {size}. Pass a positive number."
            )


def check_shares(**shares: float) -> None:
    """Refuse shares that leave one of two parts empty.

    Args:
        **shares: By the name of their setting.

    Raises:
        ValueError: If one is not between 0 and 1.
    """
    for name, share in shares.items():
        if not 0.0 < share < 1.0:
            raise ValueError(
                f"Expected `{name}` to be between 0 and 1, both excluded, but got {share}. Pass "
                "0.2 for a fifth."
            )


def check_merging(steering: str, *, merge_val: bool) -> None:
    """Refuse to merge the validation rows twice.

    Args:
        steering: Which rows steer.
        merge_val: Whether validation rows are training rows from the start.

    Raises:
        ValueError: If they are, and would become so later too.
    """
    if merge_val and steering == "late":
        raise ValueError(
            "Expected `merge_val` to be False with `steering`='late', which trains on the "
            "validation rows from half of the training on, but got True. Set one of the two."
        )


def check_steering(steering: str, *, merge_val: bool) -> None:
    """Refuse to steer by validation rows that are trained on.

    Args:
        steering: Which rows steer.
        merge_val: Whether validation rows are training rows too.

    Raises:
        MisconfigurationException: If the same rows would do both.
    """
    if merge_val and steering == "val":
        raise MisconfigurationException(
            "Expected `steering` to be 'train' or 'split' with `merge_val`=True, but got 'val'. "
            "The validation rows are trained on; steer by the clean training rows, or by a part "
            "of them."
        )
