"""What a refined step tells, and when Lightning is told.

One call of ``log`` costs Lightning about 0.25 ms on a CPU, and gates alone have one value for every
group, so values that nobody would read are neither computed nor logged.
"""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from .gating import Gates
from .learned import Learned, mean_metrics
from .step import SAflexStep

__all__ = ["is_read_before_next", "log_metrics", "read_step"]


def read_step(
    learned: Sequence[Learned],
    gates: Gates | None,
    *,
    seconds: float,
    val_gradient_norm: Tensor,
    skipped: Tensor,
) -> dict[str, Tensor]:
    """Return what a step learned.

    Args:
        learned: By its tasks; at least one.
        gates: Where groups are gated.
        seconds: What the solve took.
        val_gradient_norm: Norm of the newest validation gradient, scalar.
        skipped: Skipped steps of the whole run, scalar.

    Returns:
        Scalars by name.
    """
    return {
        **mean_metrics(learned),
        **({} if gates is None else gates.metrics()),
        "val_gradient_norm": val_gradient_norm,
        "solve_seconds": torch.tensor(seconds),
        "skipped_steps": skipped.float(),
    }


def is_read_before_next(trainer: pl.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Return whether a logger or the end of an epoch, or of the fit, comes before the next solve.

    Args:
        trainer: The Trainer.
        batch_idx: Number of the training batch in its epoch.
        every_n_steps: Training batches from one refined step to the next.
    """
    interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
    stepped = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning itself counts
    to_logger = interval - stepped % interval if interval else float("inf")
    to_end = trainer.num_training_batches - batch_idx
    if trainer.max_steps >= 0:
        to_end = min(to_end, trainer.max_steps - trainer.global_step + 1)
    is_last = trainer.is_last_batch or trainer.should_stop  # of an epoch of unknown length, say
    return is_last or min(to_logger, to_end) <= every_n_steps


def log_metrics(module: pl.LightningModule, step: SAflexStep, values: Mapping[str, Tensor]) -> None:
    """Log what a step learned, by names that begin with ``saflex/``.

    What the settings make constant is left out of the progress bar.

    Args:
        module: The module.
        step: The step.
        values: From `read_step`.
    """
    preset = step.preset
    shown = {
        "kept_fraction": preset.weight_rule in {"expected", "sum", "positive"},
        "relabelled_fraction": preset.label_rule != "keep",
        "effective_fraction": preset.weight_rule != "ones",
    }
    for name, value in values.items():
        module.log(
            f"saflex/{name}",
            value,
            prog_bar=shown.get(name, False),
            on_step=True,
            on_epoch=False,
            batch_size=step.batch_size,
        )
