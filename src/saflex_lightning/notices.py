"""What a fit is warned of: each subject once, on rank zero."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from .step import SAflexStep

__all__ = ["Notices", "SAflexWarning"]


class SAflexWarning(UserWarning):
    """Something about the data or the model makes SAFLEX's result weaker than it looks."""


class Notices:
    """Warn, and remember of what."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, message: str) -> None:
        """Warn, unless a message of the same subject was said.

        Args:
            message: Its subject is what comes before the first comma.
        """
        subject = message.split(",")[0]
        if subject not in self._said:
            self._said.add(subject)
            rank_zero_warn(message, category=SAflexWarning)

    def say_non_finite(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Warn that a solve met a non-finite number.

        Args:
            trainer: The Trainer.
            batch_idx: The batch at which that is known.
        """
        self.say(
            "Expected finite gradients and scores, but SAFLEX met a non-finite number in the "
            f"solve at or before batch {batch_idx} of epoch {trainer.current_epoch}. Such "
            "steps are trained with weights 1 and upstream labels; this is said once. Look "
            "at the validation rows, the learning rate and the loss."
        )

    def say_out_of_memory(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Warn that a solve ran out of memory.

        Args:
            trainer: The Trainer.
            batch_idx: The batch.
        """
        self.say(
            f"Expected memory for the solve, but it ran out at batch {batch_idx} of epoch "
            f"{trainer.current_epoch}. Such steps are trained plainly; this is said once. Lower "
            "`val_batch_size` or the training batch, or pass engine='head'."
        )

    def say_under_parameterised(self, step: SAflexStep) -> None:
        """Warn where a step has more unknowns than parameters to tell them apart by.

        Args:
            step: A solved step.
        """
        if step.preset.weight_rule == "ones" and step.preset.label_rule == "keep":
            return  # the solve tells no rows apart
        matched = sum(parameter.numel() for parameter in step.engine.params)
        unknowns = step.world_size * step.solutions[0].soft_labels.numel()
        if unknowns > matched:
            self.say(
                "Expected more matched parameters than unknowns, but there are "
                f"{matched} against {unknowns} (rows times classes). In this under-parameterised "
                "regime rows are told apart poorly; use smaller batches or match more parameters."
            )

    def say_same_rows(self, roles: Iterable[str]) -> None:
        """Warn that the rows that steer play another role too, once for each.

        Args:
            roles: As verbs, from `other_roles`.
        """
        for role in roles:
            self.say(
                f"Expected rows that {role} not to steer SAFLEX, but the same rows also {role}. "
                "Their score is then too good; give SAFLEX other rows with `val_dataloader` or "
                "`saflex_dataloader()`."
            )

    def say_changed_settings(
        self, names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Warn that a checkpoint was written with other settings.

        Args:
            names: Those that differ, if any.
            before: Settings of the run that wrote it.
            now: Settings of the run that reads it.
        """
        if names:
            changes = (
                f"`{name}` was {before.get(name)!r} and is now {now.get(name)!r}" for name in names
            )
            self.say(
                "Expected the settings that the checkpoint was written with, but "
                + ", ".join(changes)
                + ". The run goes on with those of now and will not equal an uninterrupted one."
            )
