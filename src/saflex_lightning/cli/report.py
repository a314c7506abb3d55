"""What one run tells at its end: the numbers of the last epoch and a table of them."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import lightning as L
import torch
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from saflex_lightning import SAflexCallback
from saflex_lightning.recipes.label_noise import detection_auroc

__all__ = ["RunReport", "make_run_table", "read_report"]

# Entries of the report that are None without the callback.
FRACTIONS = ("kept_fraction", "relabelled_fraction", "effective_fraction")
SOLVE_SECONDS = "solve_seconds"
OVERHEAD = "overhead_ratio"
PREFIX = "report/"


class RunReport(L.Callback):
    """Average the step time and the SAFLEX metrics over the last training epoch.

    Put it behind `SAflexCallback` in the list of callbacks: it reads, at the end of a step, what
    that one has just learned. A step lasts from the end of the step before it, so loading counts
    and validation does not.
    """

    def __init__(self) -> None:
        self._train_start = 0.0
        self._overhead: Tensor | None = None  # of a run's first steps, where they are measured
        self._step_start = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps = self._refined_steps = 0
        self._step_seconds = 0.0
        self._sums: dict[str, Any] = {}
        self._step_start = perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the whole training."""
        self._train_start, self._overhead = perf_counter(), None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the epoch before."""
        self._reset()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add up the step. Sums stay on their device, so that no step waits for a copy."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, SAflexCallback):
                continue
            metrics = callback.read_metrics()
            self._refined_steps += bool(metrics)
            self._overhead = metrics.get(OVERHEAD, self._overhead)
            for name in (*FRACTIONS, SOLVE_SECONDS):
                if name in metrics:
                    self._sums[name] = self._sums.get(name, 0.0) + metrics[name]
        now = perf_counter()
        self._steps += 1
        self._step_seconds += now - self._step_start
        self._step_start = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out of the next step."""
        self._step_start = perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the report, averaged over processes: only metrics return from spawned ones."""
        for name, value in self._summarize(trainer).items():
            pl_module.log(f"{PREFIX}{name}", value, logger=False, sync_dist=True)

    def _summarize(self, trainer: L.Trainer) -> dict[str, float]:
        steps, refined_steps = max(self._steps, 1), max(self._refined_steps, 1)
        sums = {name: float(torch.as_tensor(total)) for name, total in self._sums.items()}
        step_seconds = self._step_seconds / steps
        solve_seconds = sums.pop(SOLVE_SECONDS, 0.0) / steps
        means = {name: total / refined_steps for name, total in sums.items()}
        auroc = detection_auroc(trainer)
        return {
            **means,
            **({} if auroc is None else {"wrong_label_auroc": auroc}),
            **({} if self._overhead is None else {OVERHEAD: float(self._overhead)}),
            "steps": float(trainer.global_step),
            "step_seconds": step_seconds,
            "step_seconds_without_solve": step_seconds - solve_seconds,
            "train_seconds": perf_counter() - self._train_start,
        }


def read_report(metrics: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what `RunReport` logged in the last epoch.

    ``step_seconds_without_solve`` is the mean step less the mean solve, ``overhead_ratio`` what
    `SAflexCallback` measured with ``measure_overhead=True``.

    Args:
        metrics: The Trainer's ``callback_metrics`` after the fit.

    Returns:
        Number of optimizer steps, means over the steps of the last epoch, seconds, and
        `detection_auroc` where labels were planted; None for what SAFLEX does not have or its
        settings make constant.
    """
    logged = {
        name.removeprefix(PREFIX): value.item()
        for name, value in metrics.items()
        if name.startswith(PREFIX)
    }
    return {**dict.fromkeys(FRACTIONS), **logged, "steps": int(logged.get("steps", 0))}


def make_run_table(result: dict[str, Any]) -> Table:
    """Return the table that ends a run.

    What the method does not have, or the model does not log, is left out.

    Args:
        result: What `saflex_lightning.cli.train.train` returns.
    """
    rows = {
        "test accuracy": ("test_accuracy", "{:.2%}"),
        "test AUROC (macro, one against the rest)": ("test_auroc", "{:.4f}"),
        "test F1 (macro)": ("test_f1", "{:.4f}"),
        "test F1 (macro), out of distribution": ("test_ood_f1", "{:.4f}"),
        "AUROC of planted wrong labels": ("wrong_label_auroc", "{:.4f}"),
        "kept fraction (last epoch)": ("kept_fraction", "{:.3f}"),
        "relabelled fraction (last epoch)": ("relabelled_fraction", "{:.3f}"),
        "effective fraction (last epoch)": ("effective_fraction", "{:.3f}"),
        "seconds per step": ("step_seconds", "{:.3f}"),
        "seconds per step without the solve": ("step_seconds_without_solve", "{:.3f}"),
        "refined step to plain step, in time": (OVERHEAD, "{:.2f}"),
        "seconds of training": ("train_seconds", "{:.0f}"),
    }
    # `Text` is printed as it is: a name in brackets is no markup.
    name = Column(Text(str(result["name"])))
    table = Table("result", name, title=Text(f"seed {result['seed']}"))
    for label, (key, form) in rows.items():
        if result.get(key) is not None:
            table.add_row(label, form.format(result[key]))
    return table
