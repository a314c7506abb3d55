"""Where the rows that steer come from, whether they suffice, and what else they do in a run."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
    "check_is_loader",
    "check_loader",
    "count_rows",
    "is_a",
    "is_plain",
    "other_roles",
    "same_rows",
    "trainer_loader",
]


def ask_hook(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> Any:
    """Return what a hook of the datamodule gives, else of the module; None where none answers."""
    for owner in (trainer.datamodule, module):  # type: ignore[attr-defined]
        hook = getattr(owner, name, None)
        answer = hook() if callable(hook) else None
        if answer is not None:
            return answer
    return None


def trainer_loader(trainer: pl.Trainer) -> Any:
    """Return the Trainer's first validation loader, or None; it is loaded where that was left.

    The Trainer loads them before the first epoch that validates, or for the sanity check, which a
    resumed run skips.
    """
    if trainer.enable_validation and trainer.val_dataloaders is None:
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    loaders: Any = trainer.val_dataloaders
    while isinstance(loaders, (list, tuple, dict)):
        values = list(loaders.values()) if isinstance(loaders, dict) else list(loaders)
        loaders = values[0] if values else None
    return loaders


def check_is_loader(loader: Any) -> None:
    """Refuse what is no loader, several of them, or can be iterated only once."""
    if _holds_loaders(loader):
        held = loader.flattened if is_a(loader, "CombinedLoader") else loader
        raise TypeError(
            f"Expected one dataloader of validation rows for SAFLEX, but got a "
            f"{type(loader).__name__} of {len(held)}. Pass one of them as `val_dataloader`, or one "
            "loader over a `torch.utils.data.ConcatDataset` of their datasets."
        )
    is_rows = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    is_once = isinstance(loader, (str, bytes, Iterator))
    if is_rows or is_once or not isinstance(loader, Iterable):
        raise TypeError(
            "Expected a dataloader of validation rows for SAFLEX, or an iterable of batches that "
            f"can be iterated again, but got {type(loader).__name__}. Pass a `DataLoader` as "
            "`val_dataloader`; a preset is passed by its name, `preset=`."
        )


def check_loader(loader: Any, world_size: int, batch_size: int | None) -> None:
    """Refuse what cannot be drawn from, has too few rows, or samples against `val_batch_size`."""
    if loader is None:
        raise MisconfigurationException(
            "Expected validation rows for SAFLEX, but found no `val_dataloader` argument, no "
            "`saflex_dataloader()` hook of the datamodule or module, and no validation dataloader "
            "in the Trainer that is in use: `limit_val_batches` may be 0, or `validation_step` "
            "missing. Pass `SAflexCallback(val_dataloader=...)`."
        )
    check_is_loader(loader)
    if not is_plain(loader) and batch_size is not None:
        raise MisconfigurationException(
            "Expected a `DataLoader` without sampling of its own for `val_batch_size`, but got "
            f"{type(loader).__name__}, whose batches are drawn as they are. Set the batch size "
            "there, and leave the setting alone."
        )
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
    """Return which of ``"select checkpoints"`` and ``"test"`` the steering rows do too."""
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

    roles = []
    if _monitors_validation(trainer) and shared(trainer.val_dataloaders):
        roles.append("select checkpoints")
    if shared(trainer.test_dataloaders):
        roles.append("test")
    return roles


def _monitors_validation(trainer: pl.Trainer) -> bool:
    """Say whether a callback or a schedule looks at a metric that is none of training's by name."""
    watchers: list[Any] = [*trainer.callbacks]  # type: ignore[attr-defined]
    watchers += [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    names = [getattr(watcher, "monitor", None) for watcher in watchers]
    return any(name is not None and not name.startswith("train") for name in names)


def count_rows(loader: object) -> int | None:
    """Return how many rows a loader's dataset has; None where only iterating could tell."""
    if isinstance(loader, (list, tuple)):  # of batches
        return None if loader else 0
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized):
        return None
    holds_batches = isinstance(loader, DataLoader) and loader.batch_sampler is None
    return None if holds_batches and len(dataset) else len(dataset)


def is_plain(loader: object) -> bool:
    """Say whether a loader is a dataset in batches, whose rows may be drawn in another order."""
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


def same_rows(first: object, second: object) -> bool:
    """Say whether two datasets are one object, or subsets of it that overlap."""
    if isinstance(first, Subset) and isinstance(second, Subset):
        shared = set(first.indices) & set(second.indices)
        return bool(shared) and same_rows(first.dataset, second.dataset)
    if isinstance(first, Subset):
        return same_rows(first.dataset, second)
    if isinstance(second, Subset):
        return same_rows(first, second.dataset)
    return first is second


def _holds_loaders(loader: object) -> bool:
    if isinstance(loader, (list, tuple)):
        return any(isinstance(part, DataLoader) for part in loader)
    return isinstance(loader, Mapping) or is_a(loader, "CombinedLoader")


def is_a(instance: object, *names: str) -> bool:
    """Say whether a class of one of the names is among those of an object.

    Lightning is published twice, also as ``pytorch_lightning``, with classes of the same names that
    know nothing of one another.
    """
    return any(cls.__name__ in names for cls in type(instance).__mro__)
