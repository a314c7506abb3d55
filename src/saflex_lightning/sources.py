"""Where the rows that steer come from, whether they suffice, and what else they do in a run."""

from collections.abc import Mapping, Sized
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Subset

__all__ = [
    "check_rows",
    "count_rows",
    "find_steering_loader",
    "first_loader",
    "other_roles",
    "same_rows",
]


def find_steering_loader(trainer: pl.Trainer, module: pl.LightningModule, given: Any) -> Any:
    """Return the loader of validation rows: the argument, or a `saflex_dataloader` hook.

    Args:
        trainer: The Trainer.
        module: Its module.
        given: What the user passed to the callback.

    Returns:
        A loader, or None where only the Trainer's own validation data remains.
    """
    if given is not None:
        return given
    for owner in (trainer.datamodule, module):  # type: ignore[attr-defined]
        hook = getattr(owner, "saflex_dataloader", None)
        loader = hook() if callable(hook) else None
        if loader is not None:
            return loader
    return None


def first_loader(loaders: Any) -> Any:
    """Return the first of the loaders that the Trainer holds, in whatever collection.

    Args:
        loaders: A loader, a list or dictionary of them, or None.

    Returns:
        One loader or None.
    """
    while isinstance(loaders, (list, tuple, dict)):
        values = list(loaders.values()) if isinstance(loaders, dict) else list(loaders)
        loaders = values[0] if values else None
    return loaders


def check_rows(loader: Any, batch_size: int | None, world_size: int) -> None:
    """Check that there are enough validation rows.

    Args:
        loader: The loader found.
        batch_size: Rows per batch and process that were asked for; None if none were.
        world_size: Number of processes.

    Raises:
        MisconfigurationException: If no loader, several, no rows or too few rows were found.
    """
    if loader is None:
        raise MisconfigurationException(
            "Expected validation rows for SAFLEX, but found no `val_dataloader` argument, no "
            "`saflex_dataloader()` hook of the datamodule or module, and no validation dataloader "
            "in the Trainer. Pass `SAflexCallback(val_dataloader=...)`."
        )
    if _holds_loaders(loader):
        raise MisconfigurationException(
            f"Expected one dataloader of validation rows for SAFLEX, but got a "
            f"{type(loader).__name__} of {len(loader)}. Pass one of them, or one loader over a "
            "`torch.utils.data.ConcatDataset` of their datasets."
        )
    rows = count_rows(loader)
    if rows == 0:
        raise MisconfigurationException(
            "Expected the validation data of SAFLEX to have rows, but it is empty. Pass a "
            "dataloader with at least one row per process."
        )
    share = None if rows is None else rows // world_size
    needed = batch_size or (loader.batch_size if getattr(loader, "drop_last", False) else 1)
    if share is not None and needed > share:
        raise MisconfigurationException(
            f"Expected at least {needed} validation rows per process, but found {share} "
            f"({rows} rows over {world_size} processes). Lower `val_batch_size` or give SAFLEX "
            "more rows."
        )


def other_roles(trainer: pl.Trainer, loader: Any) -> list[str]:
    """Say which other roles the steering rows play in this run.

    Args:
        trainer: The Trainer, with its dataloaders set up.
        loader: The loader that steers.

    Returns:
        None, one or both of ``"select checkpoints"`` and ``"test"``.
    """
    steering = getattr(loader, "dataset", loader)

    def shared(loaders: Any) -> bool:
        if isinstance(loaders, dict):
            loaders = list(loaders.values())
        if not isinstance(loaders, (list, tuple)):
            loaders = [loaders]
        return any(
            same_rows(steering, getattr(other, "dataset", other))
            for other in loaders
            if other is not None
        )

    monitors = any(
        getattr(callback, "monitor", None) is not None
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    roles = []
    if monitors and shared(trainer.val_dataloaders):
        roles.append("select checkpoints")
    if shared(trainer.test_dataloaders):
        roles.append("test")
    return roles


def count_rows(loader: object) -> int | None:
    """Return how many rows a loader's dataset has.

    Args:
        loader: A dataloader or another iterable.

    Returns:
        The number, or None where only iterating could tell.
    """
    dataset = getattr(loader, "dataset", loader if isinstance(loader, (list, tuple)) else None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _holds_loaders(loader: object) -> bool:
    if isinstance(loader, (list, tuple)):
        return any(isinstance(part, DataLoader) for part in loader)
    return isinstance(loader, Mapping)


def same_rows(first: object, second: object) -> bool:
    """Say whether two datasets hold the same rows: one object, or subsets of it that overlap.

    Args:
        first: A dataset.
        second: Another.

    Returns:
        True if at least one row is known to be in both.
    """
    if isinstance(first, Subset) and isinstance(second, Subset):
        shared = set(first.indices) & set(second.indices)
        return bool(shared) and same_rows(first.dataset, second.dataset)
    if isinstance(first, Subset):
        return same_rows(first.dataset, second)
    if isinstance(second, Subset):
        return same_rows(first, second.dataset)
    return first is second
