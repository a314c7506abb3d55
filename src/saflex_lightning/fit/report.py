"""What a fit says: one line at its start, what each step learned, and each warning once."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from saflex_lightning.functional.settings import PRESETS, Settings
from saflex_lightning.functional.solve import solution_metrics
from saflex_lightning.step import Step

__all__ = [
    "Report",
    "SAflexWarning",
    "describe_fit",
    "is_read_before_next",
    "log_metrics",
    "read_step",
]


class SAflexWarning(UserWarning):
    """Something about the data or the model makes SAFLEX's result weaker than it looks."""


def describe_fit(settings: Settings, engine: str) -> str:
    """Return what a fit will learn and how, in one line."""
    learned = [
        what
        for what, is_learned in (
            ("sample weights", settings.weight_rule != "ones"),
            ("soft labels", settings.label_rule != "keep"),
            ("gates", settings.gates),
            ("weights of pool rows", settings.row_evidence),
        )
        if is_learned
    ]
    letter = (
        "This is Algorithm 1 of the paper."
        if settings == PRESETS["paper"]
        else "Algorithm 1 to the letter: SAflexCallback(preset='paper')."
    )
    interval = settings.refresh_every_n_steps
    return (
        f"SAFLEX learns {' and '.join(learned) or 'nothing'} with {engine} and a validation "
        f"gradient every {'' if interval == 1 else f'{interval} '}training "
        f"batch{'' if interval == 1 else 'es'}. {letter}"
    )


def read_step(step: Step, val_gradient_norm: Tensor, skipped: Tensor) -> dict[str, Tensor]:
    """Return what a step learned, as scalars; fractions are averaged over its tasks."""
    tasks: list[dict[str, Tensor]] = []
    for task in step.tasks:
        metrics = solution_metrics(task.solution, task.target, task.augmented)
        if task.gated is not None:  # rows that the gates turned down count as dropped
            metrics["kept_fraction"] = metrics["kept_fraction"] * task.gated.left_fraction
        tasks.append(metrics)
    return {
        **{name: torch.stack([task[name].float() for task in tasks]).mean() for name in tasks[0]},
        **({} if step.fit.gates is None else step.fit.gates.metrics()),
        "val_gradient_norm": val_gradient_norm,
        "solve_seconds": torch.tensor(step.seconds),
        "skipped_steps": skipped.float(),
    }


def is_read_before_next(trainer: pl.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Say whether a logger or the end of an epoch, or of the fit, comes before the next solve.

    One call of ``log`` costs Lightning about 0.25 ms on a CPU, and gates alone have one value for
    every group, so values that nobody would read are neither computed nor logged.
    """
    interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
    stepped = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning itself counts
    to_logger = interval - stepped % interval if interval else float("inf")
    to_end = trainer.num_training_batches - batch_idx
    if trainer.max_steps >= 0:
        to_end = min(to_end, trainer.max_steps - trainer.global_step + 1)
    is_last = trainer.is_last_batch or trainer.should_stop  # of an epoch of unknown length, say
    return is_last or min(to_logger, to_end) <= every_n_steps


def log_metrics(module: pl.LightningModule, step: Step, values: Mapping[str, Tensor]) -> None:
    """Log what a step learned, by names that begin with ``saflex/``.

    What the settings make constant is left out of the progress bar.
    """
    settings = step.fit.settings
    shown = {
        "kept_fraction": settings.weight_rule in {"expected", "sum", "positive"},
        "relabelled_fraction": settings.label_rule != "keep",
        "effective_fraction": settings.weight_rule != "ones",
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


class Report:
    """Warn on rank zero, of each subject once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.skipped_before = 0  # steps of the run that this one resumes

    def say(self, message: str) -> None:
        """Warn, unless a message of the same subject, what comes before the comma, was said."""
        subject = message.split(",")[0]
        if subject not in self._said:
            self._said.add(subject)
            rank_zero_warn(message, category=SAflexWarning)

    def look_at_skipped(self, skipped: Tensor, epoch: int, batch_idx: int) -> None:
        """Warn where a solve has met a non-finite number; waits for the device."""
        if int(skipped) == self.skipped_before:
            return
        self.say(
            "Expected finite gradients and scores, but SAFLEX met a non-finite number in the "
            f"solve at or before batch {batch_idx} of epoch {epoch}. Such "
            "steps are trained with weights 1 and upstream labels; this is said once. Look "
            "at the validation rows, the learning rate and the loss."
        )

    def say_under_parameterised(self, step: Step) -> None:
        """Warn where a step has more unknowns than parameters to tell them apart by."""
        if step.fit.is_partial or not step.fit.settings.learns_weights_or_labels:
            return  # one layer tells rows apart by their features; nothing is told apart
        matched = sum(parameter.numel() for parameter in step.fit.engine.params)
        unknowns = step.fit.ranks.size * step.tasks[0].solution.soft_labels.numel()
        if unknowns > matched:
            self.say(
                "Expected more matched parameters than unknowns, but there are "
                f"{matched} against {unknowns} (rows times classes). In this under-parameterised "
                "regime rows are told apart poorly; use smaller batches or match more parameters."
            )

    def say_same_rows(self, roles: Iterable[str]) -> None:
        """Warn that the rows that steer play other roles too."""
        for role in roles:
            self.say(
                f"Expected rows that {role} not to steer SAFLEX, but the same rows also {role}. "
                "Their score is then too good; give SAFLEX other rows with `val_dataloader` or "
                "`saflex_dataloader()`."
            )

    def say_changed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Return the settings that differ from those of a checkpoint, and warn of them."""
        missing = object()
        changed = sorted(
            name for name in {*before, *now} if before.get(name, missing) != now.get(name, missing)
        )
        if changed:
            changes = (f"`{n}` was {before.get(n)!r} and is now {now.get(n)!r}" for n in changed)
            self.say(
                "Expected the settings that the checkpoint was written with, but "
                + ", ".join(changes)
                + ". The run goes on with those of now and will not equal an uninterrupted one."
            )
        return changed
