"""What the commands add to a Trainer: its progress, and what SAFLEX learned."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console

from saflex_lightning import SAflexCallback, SAflexInsight

__all__ = ["ProgressLines", "ShortBar", "add_insight", "make_progress"]

FIRST, NEXT = 2.0, 10.0  # seconds to the first line, and between two lines


def add_insight(callbacks: list[L.Callback], folder: str | Path | None = None) -> None:
    """Put `SAflexInsight` behind `SAflexCallback`, unless it is there already."""
    if any(isinstance(callback, SAflexInsight) for callback in callbacks):
        return
    for place, callback in enumerate(callbacks):
        if isinstance(callback, SAflexCallback):
            callbacks.insert(place + 1, SAflexInsight(folder))
            return


def make_progress() -> ProgressBar:
    """Return a bar for a terminal or a notebook, and lines for a file."""
    console = Console()
    return ShortBar() if console.is_terminal or console.is_jupyter else ProgressLines()


class ShortBar(RichProgressBar):
    """Lightning's bar with short names."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_text_delimiter=", "))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return Lightning's metrics by short names."""
        return _shorten(super().get_metrics(trainer, pl_module))


class ProgressLines(ProgressBar):
    """Print a line in every ten seconds of training, and one at its end.

    Bars draw over themselves: in a file rich's shows its end alone, and tqdm's every single state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_on = True

    def enable(self) -> None:
        """Print."""
        self._is_on = True

    def disable(self) -> None:
        """Print nothing, as on all processes but the first."""
        self._is_on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = perf_counter()
        self._first_step = trainer.global_step
        self._due = self._start + FIRST

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the number of the epoch, which Lightning has raised when training ends."""
        self._epoch = trainer.current_epoch + 1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print a line where it is time for one."""
        if perf_counter() < self._due:
            return
        self._due = perf_counter() + NEXT
        steps, total = trainer.global_step - self._first_step, trainer.estimated_stepping_batches
        left = (total - trainer.global_step) / steps if steps else float("inf")
        if left < float("inf"):
            self._print(trainer, pl_module, f"{self._spell(left)} left")
        else:
            self._print(trainer, pl_module, f"{self._spell()} so far")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last line."""
        self._print(trainer, pl_module, f"{self._spell()} in all")

    def _spell(self, share: float = 1.0) -> str:
        """Return a share of the time that has passed."""
        return str(timedelta(seconds=round(share * (perf_counter() - self._start))))

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule, time: str) -> None:
        if not self._is_on:
            return
        metrics = _shorten(self.get_metrics(trainer, pl_module))
        words = [f"{name} {value:.3f}" for name, value in metrics.items() if _is_number(value)]
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        print(", ".join([f"epoch {self._epoch}{of}", *words, time]), flush=True)


def _shorten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics by names that fit in a line: loss, effective, val accuracy."""
    return {
        name.removeprefix("train/")
        .removeprefix("saflex/")
        .removesuffix("_fraction")
        .replace("/", " "): value
        for name, value in metrics.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
