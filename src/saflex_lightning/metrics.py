"""What a refined step logs."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from .step import SAflexStep

__all__ = ["log_metrics"]


def log_metrics(
    module: pl.LightningModule, step: SAflexStep, *, val_gradient_norm: Tensor, skipped: Tensor
) -> None:
    """Log what a step learned, by names that begin with ``saflex/``.

    What the settings make constant is left out of the progress bar.

    Args:
        module: The module.
        step: A solved step.
        val_gradient_norm: Norm of the newest validation gradient, scalar.
        skipped: Skipped steps of the whole run, scalar.
    """
    gates, preset = step.gathered.gates, step.preset
    values: dict[str, Any] = {
        **step.metrics,
        **({} if gates is None else gates.metrics()),
        "val_gradient_norm": val_gradient_norm,
        "solve_seconds": step.seconds,
        "skipped_steps": skipped.float(),
    }
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
