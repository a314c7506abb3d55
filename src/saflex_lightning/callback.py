"""The callback: when each thing happens; what happens is in `fit`."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import Unpack

from .evidence.averages import RowEvidence
from .evidence.evidence import GroupEvidence
from .fit.checks import (
    STATE_VERSION,
    check_fit,
    check_model,
    check_state,
    damaged_state,
    find_group_names,
)
from .fit.report import Report, log_metrics, log_settings, read_step
from .fit.run import Fit
from .functional.settings import PresetName, SettingsKwargs, make_settings
from .step import SolvedTask, Step, StepRows
from .validation.source import ask_hook, check_is_loader, check_loader, other_roles, trainer_loader

__all__ = ["SAflexCallback"]


class SAflexCallback(pl.Callback):
    """Learn sample weights and soft labels for each training batch from validation data.

    A module that trains on one cross-entropy stays as it is: the callback answers that call with
    the refined loss. A module that derives from `SAflexMixin` says itself what is refined, and
    trains by the same numbers. ``SAflexCallback(preset="paper")`` is Algorithm 1 of the paper to
    the letter.

    Args:
        val_dataloader: Validation rows that steer; keeps its batch size. None asks the hook
            ``saflex_dataloader()`` of the datamodule, then of the module, then takes the Trainer's
            own validation data, in a loader of our own.
        preset: ``"robust"``, ``"gradient"`` (for contrastive scores) or ``"paper"``; the values of
            all settings that are not given.
        **settings: See `Settings`; None keeps the preset's value.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If there is no such setting, or ``val_dataloader`` is no loader.
    """

    def __init__(
        self,
        val_dataloader: Iterable[Any] | None = None,
        preset: PresetName = "robust",
        **settings: Unpack[SettingsKwargs],
    ) -> None:
        self.preset = preset
        self.settings = make_settings(preset, **settings)
        if val_dataloader is not None:
            check_is_loader(val_dataloader)
        if val_dataloader is not None and self.settings.val_batch_size is not None:
            raise ValueError(
                f"Expected `val_batch_size` to be None beside `val_dataloader`, but got "
                f"{self.settings.val_batch_size}. A loader keeps its own batch size; set it there."
            )
        self._given_loader = val_dataloader
        self._begin()

    def _begin(self) -> None:
        self._report = Report()
        self._fit = Fit(self.settings, self._report)
        self._loader: Any = None
        self._step: Step | None = None
        self._newest: Step | None = None  # until its metrics are read
        self._metrics: dict[str, Tensor] = {}
        self._solved: SolvedTask | None = None
        self._armed_steps = self._loss_calls = 0  # of this epoch

    # Once per fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage == "fit":
            check_fit(trainer, pl_module, self.settings)
            self._begin()  # a checkpoint's state is loaded after this hook
            log_settings(trainer, pl_module, {"preset": self.preset, **asdict(self.settings)})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the model, and find rows other than the Trainer's own."""
        check_model(pl_module, self.settings)
        self._loader = self._given_loader
        if self._loader is None:
            self._loader = ask_hook(trainer, pl_module, "saflex_dataloader")
        if self._loader is not None:
            check_loader(self._loader, trainer.world_size, self.settings.val_batch_size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fall back on the Trainer's validation data; warn where steering rows also select."""
        gathers = self.settings.row_evidence
        if self._loader is None:
            self._loader = trainer_loader(trainer)
            check_loader(self._loader, trainer.world_size, self.settings.val_batch_size)
        self._report.say_same_rows(other_roles(trainer, self._loader))
        self._fit.start(
            trainer,
            pl_module,
            self._loader,
            keep_batch_size=self._given_loader is not None,
            group_names=find_group_names(trainer, pl_module) if gathers else (),
        )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the rows that steered also test."""
        loader = self._given_loader if self._loader is None else self._loader
        if loader is not None:
            self._report.say_same_rows(other_roles(trainer, loader))

    # Every training step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the validation gradient where it is due, and arm the module."""
        self._step = self._fit.arm(trainer, pl_module, batch)
        self._fit.served.arm(self._step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Disarm the module, take in what was learned, and log it where a logger would read it."""
        step, self._step = self._step, None
        self._newest, self._metrics, self._solved = None, {}, None
        self._fit.served.disarm()
        if step is not None:
            self._take_in(trainer, pl_module, step, outputs, batch_idx)
        if self._fit.meter is not None:
            self._fit.meter.end()

    def _take_in(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        step: Step,
        outputs: Any,
        batch_idx: int,
    ) -> None:
        """Take in what a refined step has shown, and log it."""
        met_trouble = self._fit.end(step)
        self._armed_steps += 1
        self._loss_calls += step.options is not None
        if step.options is None and outputs:
            self._report.say_no_loss(pl_module)
        if step.tasks:
            self._newest, self._solved = step, step.tasks[0]
            is_read = self._is_read_before_next(trainer, batch_idx)
            if is_read or met_trouble:
                self._report.look_at(step, trainer, batch_idx)
            if is_read:
                log_metrics(pl_module, step, self.read_metrics())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on when an epoch of refined steps never asked for the loss."""
        if self._armed_steps and not self._loss_calls:
            raise MisconfigurationException(
                f"Expected `training_step` of {type(pl_module).__name__} to call "
                f"`self.saflex_loss(...)`, but it was not called in {self._armed_steps} steps. "
                "Return the loss that `saflex_loss` computes from the logits of `saflex_forward`."
            )
        self._armed_steps = self._loss_calls = 0

    def _is_read_before_next(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Say whether a logger or the end of an epoch, or of the fit, comes before the next solve.

        One call of ``log`` costs Lightning about 0.25 ms on a CPU, and every group has values, so
        what nobody would read is neither computed nor logged.
        """
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning itself counts
        to_logger = interval - stepped % interval if interval else float("inf")
        to_end = trainer.num_training_batches - batch_idx
        if trainer.max_steps >= 0:
            to_end = min(to_end, trainer.max_steps - trainer.global_step + 1)
        is_last = trainer.is_last_batch or trainer.should_stop  # of an epoch of unknown length, say
        return is_last or min(to_logger, to_end) <= self.settings.every_n_steps

    # Reading what was gathered

    def read_metrics(self) -> dict[str, Tensor]:
        """Return what the newest training batch taught, for callbacks that come after this one.

        Lightning is told only where a logger, or the end of the epoch, would read it.

        Returns:
            Scalars by the names that are logged, without ``saflex/``, but for those that the
            settings make constant; empty where the batch was not refined.
        """
        if self._newest is not None:
            fit, step, self._newest = self._fit, self._newest, None
            norm = fit.gradient.norm if self.settings.solves else None
            self._metrics = read_step(step, norm, fit.skipped)
        return dict(self._metrics)

    def read_row_evidence(self) -> RowEvidence | None:
        """Return how well the label of each row of the pool fits, averaged over the row's visits.

        Returns:
            The rows that were seen as augmented ones and their evidence; None without
            ``row_evidence``.
        """
        evidence = self._fit.evidence
        return None if evidence is None else evidence.averages.read()

    def read_group_evidence(self) -> GroupEvidence | None:
        """Return what steps have told of each group of augmented rows.

        Returns:
            Names, shares of wrong labels, and mean evidence with its standard error; None without
            ``row_evidence``.
        """
        evidence = self._fit.evidence
        return None if evidence is None else evidence.read_groups()

    def read_step_rows(self) -> StepRows | None:
        """Return what the newest training batch told of each of its rows, of its first task.

        Returns:
            Tensors on the device where they are; None where the batch was not refined.
        """
        return None if self._solved is None else self._solved.rows()

    # Checkpoints

    @property
    def state_key(self) -> str:
        """Key of this callback's state, whatever its settings."""
        return "SAflexCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; equal on every rank."""
        settings = {"preset": self.preset, **asdict(self.settings)}
        if self._given_loader is not None:
            settings["val_batch_size"] = getattr(self._given_loader, "batch_size", None)
        return {"version": STATE_VERSION, "settings": settings, **self._fit.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped; warn where it was written with other settings."""
        expected = self.state_dict()
        check_state(state_dict, expected)
        changed = self._report.say_changed(state_dict["settings"], expected["settings"])
        fit = Fit(self.settings, self._report)
        try:
            fit.load_state_dict(state_dict, changed)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged_state(f"reading it failed with {error!r}") from error
        self._fit = fit
        self._report.skipped_before = state_dict["skipped_steps"]

    # The end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the validation stream."""
        if self._fit.meter is not None:
            self._fit.meter.say_unfinished()
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the validation stream; its worker processes end."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the validation stream."""
        self._close()

    def _close(self) -> None:
        self._fit.close()
        if self._step is not None:
            self._step.close()
            self._fit.served.disarm()
            self._step = None
