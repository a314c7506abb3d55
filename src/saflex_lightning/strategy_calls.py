"""What is asked of the Trainer's strategy: sums over ranks, moved batches, the largest batch."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from .functional import ReduceSum

__all__ = ["largest_batch", "load_validation", "make_reduce_sum", "transfer"]


def make_reduce_sum(trainer: pl.Trainer) -> ReduceSum | None:
    """Return the function that adds a tensor over ranks.

    Args:
        trainer: The Trainer.

    Returns:
        The function; None for one process.
    """
    if trainer.world_size == 1:
        return None

    def reduce_sum(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)  # the strategy's own reduce waits at a barrier first
        return total

    return reduce_sum


def transfer(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Move a validation batch as the Trainer moves one, in the validating stage.

    Args:
        trainer: The Trainer, which is training.
        module: Its module.
        batch: The batch.

    Returns:
        The batch, on the device, after the transfer hooks.
    """
    trainer.validating = True
    try:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        hook = "on_before_batch_transfer"
        owner = datamodule if datamodule and is_overridden(hook, datamodule) else module
        batch = owner.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True


def load_validation(trainer: pl.Trainer) -> Any:
    """Return the Trainer's validation loaders, and load them where that was left for later.

    Args:
        trainer: The Trainer, which is training. It loads them before the first epoch that
            validates, or for the sanity check, which a resumed run skips.

    Returns:
        A loader, a collection of them, or None where there is no validation.
    """
    if trainer.enable_validation and trainer.val_dataloaders is None:
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    return trainer.val_dataloaders


def largest_batch(trainer: pl.Trainer, batch: Any) -> float:
    """Return the rows of this training batch on the rank that has the most.

    Args:
        trainer: The Trainer.
        batch: The batch of this rank.

    Returns:
        A number of rows; every rank must ask.

    Raises:
        MisconfigurationException: If the batch holds no tensor to count the rows of.
    """
    try:
        rows = float(extract_batch_size(batch))
    except MisconfigurationException as error:
        raise MisconfigurationException(
            "Expected a training batch whose rows can be counted, to draw a share of as many "
            f"validation rows, but got {type(batch).__name__}. Pass "
            "`SAflexCallback(val_batch_size=...)`."
        ) from error
    size = torch.tensor(rows, device=trainer.strategy.root_device)
    largest = trainer.strategy.reduce(size, reduce_op="max")
    assert isinstance(largest, Tensor)
    return largest.item()
