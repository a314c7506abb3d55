"""Where the rows that steer come from, whether they suffice, and what else they do in a run."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

__all__ = [
    "ask_hook",
    "check_loader",
    "count_rows",
    "find_steering_loader",
    "first_loader",
    "is_plain",
    "other_roles",
    "same_rows",
]


def ask_hook(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> Any:
    """Return what a hook of the datamodule gives, else of the module.

    Args:
        trainer: The Trainer.
        module: Its module.
        name: Of the hook.

    Returns:
        The first answer that is not None, or None.
    """
    for owner in (trainer.datamodule, module):  # type: ignore[attr-defined]
        hook = getattr(owner, name, None)
        answer = hook() if callable(hook) else None
        if answer is not None:
            return answer
    return None


def find_steering_loader(trainer: pl.Trainer, module: pl.LightningModule, given: Any) -> Any:
    """Return the loader of validation rows: the argument, or a `saflex_dataloader` hook.

    Args:
        trainer: The Trainer.
        module: Its module.
        given: What the user passed to the callback.

    Returns:
        A loader, or None where only the Trainer's own validation data remains.
    """
    return ask_hook(trainer, module, "saflex_dataloader") if given is None else given


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


def check_loader(
    loader: Any, trainer: pl.Trainer, *, batch_size: int | None, must_cache: bool
) -> None:
    """Check that a loader can be drawn from, and has enough validation rows.

    Args:
        loader: The loader found.
        trainer: The Trainer.
        batch_size: Rows per batch and process that were asked for; None if none were.
        must_cache: Whether the rows must be kept on the device.

    Raises:
        MisconfigurationException: If no loader, several, no rows or too few rows were found, or
            the loader's own sampling stands against a setting.
    """
    if loader is None:
        raise MisconfigurationException(
            "Expected validation rows for SAFLEX, but found no `val_dataloader` argument, no "
            "`saflex_dataloader()` hook of the datamodule or module, and no validation dataloader "
            "in the Trainer that is in use: `limit_val_batches` may be 0, or `validation_step` "
            "missing. Pass `SAflexCallback(val_dataloader=...)`."
        )
    if _holds_loaders(loader):
        held = loader.flattened if isinstance(loader, CombinedLoader) else loader
        raise MisconfigurationException(
            f"Expected one dataloader of validation rows for SAFLEX, but got a "
            f"{type(loader).__name__} of {len(held)}. Pass one of them, or one loader over a "
            "`torch.utils.data.ConcatDataset` of their datasets."
        )
    is_rows = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if is_rows or isinstance(loader, (str, Iterator)) or not isinstance(loader, Iterable):
        raise MisconfigurationException(
            "Expected a dataloader of validation rows for SAFLEX, or an iterable of batches that "
            f"can be iterated again, but got {type(loader).__name__}. Pass a `DataLoader` as "
            "`val_dataloader`; a preset is passed by its name, `preset=`."
        )
    if not is_plain(loader) and (batch_size is not None or must_cache):
        raise MisconfigurationException(
            "Expected a `DataLoader` without sampling of its own for `val_batch_size` and "
            f"`cache_on_device=True`, but got {type(loader).__name__}, whose batches are drawn as "
            "they are. Set the batch size there, and leave the two settings alone."
        )
    world_size = trainer.world_size
    rows = count_rows(loader)
    if rows == 0:
        raise MisconfigurationException(
            "Expected the validation data of SAFLEX to have rows, but it is empty. Pass a "
            "dataloader with at least one row per process."
        )
    share = None if rows is None else rows // world_size
    whole = loader.batch_size if isinstance(loader, DataLoader) and loader.drop_last else 1
    needed = batch_size or whole or 1
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
    if isinstance(loader, (list, tuple)):  # of batches
        return None if loader else 0
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized):
        return None
    holds_batches = isinstance(loader, DataLoader) and loader.batch_sampler is None
    return None if holds_batches and len(dataset) else len(dataset)


def is_plain(loader: object) -> bool:
    """Say whether a loader is a dataset in batches, with no sampling of its own.

    Args:
        loader: A dataloader or another iterable.

    Returns:
        True if its rows may be drawn in another order.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    # Others that derive from these choose rows: Lightning wraps a `SubsetRandomSampler` in a
    # `DistributedSampler`, and a loader may prepare its batches.
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False
    sampler = loader.sampler
    plain = type(sampler) in {SequentialSampler, DistributedSampler} or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    return plain and type(loader.batch_sampler) is BatchSampler


def _holds_loaders(loader: object) -> bool:
    if isinstance(loader, (list, tuple)):
        return any(isinstance(part, DataLoader) for part in loader)
    return isinstance(loader, (Mapping, CombinedLoader))


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
