"""The callback: checks the set-up, arms the module before each training step, logs after it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from .arming import Arming
from .checks import check_fit, check_model, count_batches, find_group_names
from .functional import (
    EngineName,
    LabelRule,
    PresetName,
    ScoreSpace,
    WeightRule,
    make_preset,
)
from .gathered import make_gathered
from .metrics import is_read_before_next, log_metrics, read_step
from .mixin import SAflexMixin
from .notices import Notices, SAflexWarning
from .pool import RowEvidenceName
from .settings import check_choice, check_integers, describe_settings
from .skips import SkippedSteps, check_skippable
from .sources import check_loader, find_steering_loader, first_loader, other_roles
from .state import changed_settings, check_state
from .steering import Steering
from .step import SAflexStep
from .strategy_calls import load_validation

__all__ = ["SAflexCallback", "SAflexWarning"]


class SAflexCallback(pl.Callback):
    """Learn sample weights and soft labels for each training batch from validation data.

    The module derives from `SAflexMixin` and uses its two methods in ``training_step``; nothing
    else changes. ``SAflexCallback(preset="paper")`` is Algorithm 1 of the paper to the letter.

    Args:
        val_dataloader: Validation rows that steer; keeps its batch size. None asks the hook
            ``saflex_dataloader()`` of the datamodule, then of the module, then takes the Trainer's
            own validation data, in a loader of our own.
        preset: ``"robust"`` or ``"paper"``; the values of all settings left at None.
        score_space: See `Preset`, as for all settings down to ``refresh_every_n_steps``.
        normalize: See `Preset`.
        label_rule: See `Preset`.
        label_penalty: See `Preset`.
        temperature: See `Preset`.
        gumbel: See `Preset`.
        weight_rule: See `Preset`.
        gradient_decay: See `Preset`.
        precondition: See `Preset`.
        engine: See `Preset`.
        refresh_every_n_steps: See `Preset`; counts training batches.
        val_batch_size: Validation rows per batch and process; None is the preset's share of the
            first training batch, at most the rows there are.
        every_n_steps: Refine one of so many training batches; the others are trained plainly.
        start_epoch: First epoch to refine, from 0.
        params: Name patterns of the parameters to match; None means all trainable ones that an
            optimizer holds. Each new gradient looks anew, so fine-tuning schedules may freeze and
            unfreeze.
        num_workers: Worker processes that load validation batches, where the loader is not given.
        cache_on_device: Keep the validation rows on the device: True, False, or ``"auto"`` for
            under 256 MB.
        gates: Learn for each group of augmented rows (`AugmentedBatch.group`) whether it helps, and
            replace rows of harmful groups by the clean rows they were made from. The rows are
            written in the batch's own tensors, so a loader must not yield the same tensors twice;
            its length must be known, and the groups named by ``saflex_group_names()``.
        row_evidence: Weigh the augmented rows of a fixed pool (`AugmentedBatch.index`) by how well
            their labels fit, averaged over epochs: ``"label_probability"`` by the model's own
            probability of the label, ``"discriminant"`` by its posterior in a Gaussian
            discriminant on validation features; None does neither.
        seed: Seed of the order of validation rows and of Gumbel noise; None follows
            ``seed_everything``.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        val_dataloader: Iterable[Any] | None = None,
        preset: PresetName = "robust",
        *,
        score_space: ScoreSpace | None = None,
        normalize: bool | None = None,
        label_rule: LabelRule | None = None,
        label_penalty: float | None = None,
        temperature: float | None = None,
        gumbel: bool | None = None,
        weight_rule: WeightRule | None = None,
        gradient_decay: float | None = None,
        precondition: bool | None = None,
        engine: EngineName | None = None,
        refresh_every_n_steps: int | None = None,
        val_batch_size: int | None = None,
        every_n_steps: int = 1,
        start_epoch: int = 0,
        params: list[str] | None = None,
        num_workers: int = 0,
        cache_on_device: bool | Literal["auto"] = "auto",
        gates: bool = False,
        row_evidence: RowEvidenceName | None = None,
        seed: int | None = None,
    ) -> None:
        self.preset = make_preset(
            preset,
            score_space=score_space,
            normalize=normalize,
            label_rule=label_rule,
            label_penalty=label_penalty,
            temperature=temperature,
            gumbel=gumbel,
            weight_rule=weight_rule,
            gradient_decay=gradient_decay,
            precondition=precondition,
            engine=engine,
            refresh_every_n_steps=refresh_every_n_steps,
        )
        check_integers(
            every_n_steps=(every_n_steps, 1),
            start_epoch=(start_epoch, 0),
            num_workers=(num_workers, 0),
            val_batch_size=(val_batch_size, 1),
            seed=(seed, 0),
        )
        cached, weighed = (True, False, "auto"), sorted(get_args(RowEvidenceName))
        check_choice("cache_on_device", cache_on_device, cached, "True, False or 'auto'")
        check_choice("gates", gates, (True, False), "True or False")
        check_choice("row_evidence", row_evidence, (None, *weighed), f"None or one of {weighed}")
        if val_dataloader is not None and val_batch_size is not None:
            raise ValueError(
                f"Expected `val_batch_size` to be None beside `val_dataloader`, but got "
                f"{val_batch_size}. A loader keeps its own batch size; set it there."
            )
        self.preset_name = preset
        self.every_n_steps = every_n_steps
        self.start_epoch = start_epoch
        self.params = params
        self.num_workers = num_workers
        self.cache_on_device: bool | str = cache_on_device
        self.gates = gates
        self.row_evidence: RowEvidenceName | None = row_evidence
        self.seed = seed
        self.val_batch_size = val_batch_size
        self._given_loader = val_dataloader
        self._loader: Any = None
        self._begin()

    def _begin(self) -> None:
        self._steering = Steering(
            self.preset,
            seed=self.seed,
            batch_size=self.val_batch_size,
            cache=self.cache_on_device,
            gathered=make_gathered(gates=self.gates, row_evidence=self.row_evidence),
        )
        self._arming = Arming()
        self._skipped = SkippedSteps()
        self._metrics: dict[str, Tensor] = {}
        self._read_newest: Callable[[], dict[str, Tensor]] | None = None
        self._notices = Notices()
        self._group_names: Sequence[str] = ()

    # Once per fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage == "fit":
            check_fit(trainer, pl_module, self.preset)
            self._begin()  # a checkpoint's state is loaded after this hook

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the model, find rows other than the Trainer's own, and say what is learned."""
        assert isinstance(pl_module, SAflexMixin)
        watch = self._steering.gathered.watch
        wanted_by = watch and watch.wanted_by
        check_model(pl_module, self.preset, self.params, head_wanted_by=wanted_by)
        self._loader = find_steering_loader(trainer, pl_module, self._given_loader)
        if self._loader is not None:
            self._check_loader(trainer)
        if self.gates:
            self._group_names = find_group_names(trainer, pl_module)
        rank_zero_info(
            describe_settings(
                self.preset_name, self.preset, gates=self.gates, row_evidence=self.row_evidence
            )
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fall back on the Trainer's validation data; warn where steering rows also select."""
        owned = self._loader is None
        if owned:
            self._loader = first_loader(load_validation(trainer))
            self._check_loader(trainer)
        roles = other_roles(trainer, self._loader)
        self._notices.say_same_rows({"select checkpoints", *roles} if owned else roles)
        self._steering.start(
            pl_module,
            self._loader,
            params=self.params,
            num_workers=self.num_workers if owned else None,
            keep_batch_size=self._given_loader is not None,
            group_names=self._group_names,
            num_batches=count_batches(trainer) if self.gates else 0,
        )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the rows that steered also test."""
        loader = self._given_loader if self._loader is None else self._loader
        if loader is not None:
            self._notices.say_same_rows(other_roles(trainer, loader))

    def _check_loader(self, trainer: pl.Trainer) -> None:
        check_loader(
            self._loader,
            trainer,
            batch_size=self.val_batch_size,
            must_cache=self.cache_on_device is True,
        )

    # Every training step

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw a validation batch where one is due, refresh the gradient, arm the module."""
        assert isinstance(pl_module, SAflexMixin)
        due = self._steering.next_batch_number() % self.every_n_steps == 0
        active = due and trainer.current_epoch >= self.start_epoch
        if active:
            self._arming.check_free(pl_module)
        step = None
        try:
            step = self._steering.arm(trainer, pl_module, batch, active=active)
        except (RuntimeError, MemoryError) as error:
            check_skippable(error, trainer.world_size)
            self._skip_without_memory(trainer, batch_idx)
        self._arming.arm(pl_module, step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Disarm the module, and log what was learned where a logger would read it."""
        assert isinstance(pl_module, SAflexMixin)
        step = self._arming.disarm(pl_module)
        self._metrics, self._read_newest = {}, None
        if step is None:
            return
        if step.out_of_memory:
            self._skip_without_memory(trainer, batch_idx)
            return
        self._steering.end(step)
        if step.solutions:
            self._notices.say_under_parameterised(step)
            self._count_skips(trainer, step, batch_idx)
            self._read_newest = partial(  # holds neither the inputs nor a graph
                read_step,
                step.learned,
                step.gathered.gates,
                seconds=step.seconds,
                val_gradient_norm=self._steering.gradient.norm,
                skipped=self._skipped.total,
            )
            if is_read_before_next(trainer, batch_idx, self.every_n_steps):
                log_metrics(pl_module, step, self.read_metrics())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on when an epoch of refined steps never asked for the loss."""
        self._arming.end_epoch(pl_module)

    def _count_skips(self, trainer: pl.Trainer, step: SAflexStep, batch_idx: int) -> None:
        """Count solves that met non-finite numbers; look at the count now and then."""
        self._skipped.add_unless(step.finite)
        # Reading a number waits for the device, so on others than the CPU it is done rarely.
        interval = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step.finite.is_cuda and batch_idx % interval:
            return
        if self._skipped.non_finite.item():
            self._notices.say_non_finite(trainer, batch_idx)

    def _skip_without_memory(self, trainer: pl.Trainer, batch_idx: int) -> None:
        self._skipped.add()
        self._notices.say_out_of_memory(trainer, batch_idx)

    # Reading what was gathered

    def read_metrics(self) -> dict[str, Tensor]:
        """Return what the newest training batch taught, for callbacks that come after this one.

        Lightning is told only where a logger, or the end of the epoch, would read it.

        Returns:
            Scalars by the names that are logged, without ``saflex/``; empty where the batch was
            not refined.
        """
        if self._read_newest is not None:
            self._metrics, self._read_newest = self._read_newest(), None
        return dict(self._metrics)

    def read_row_evidence(self) -> Tensor | None:
        """Return how well the label of each row of the pool fits, averaged over the row's visits.

        Returns:
            ``(largest index + 1,)`` float64 in [0, 1] by `AugmentedBatch.index`, low where the
            label looks wrong and NaN for rows that were never seen as augmented ones; None
            without ``row_evidence``.
        """
        pool = self._steering.gathered.pool
        return None if pool is None else pool.read()

    # Checkpoints

    @property
    def state_key(self) -> str:
        """Key of this callback's state; callbacks of different presets or engines can coexist."""
        return self._generate_state_key(preset=self.preset_name, engine=self.preset.engine)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; equal on every rank."""
        return {
            **self._steering.state_dict(),
            "settings": self._settings(),
            "skipped_steps": int(self._skipped.total),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped; warn where it was written with other settings."""
        check_state(state_dict)
        saved, settings = state_dict["settings"], self._settings()
        changed = changed_settings(saved, settings)
        self._notices.say_changed_settings(changed, saved, settings)
        self._steering.load_state_dict(state_dict, changed)
        self._skipped = SkippedSteps(before=state_dict["skipped_steps"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where our own state is missing, take that of another preset or engine."""
        states = checkpoint["callbacks"]
        if self.state_key in states:
            return  # Lightning calls `load_state_dict`
        taken = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        prefix = f"{type(self).__qualname__}{{"
        others = [key for key in states if key.startswith(prefix) and key not in taken]
        if len(others) == 1:
            self.load_state_dict(states[others[0]])
        else:
            rank_zero_info(
                f"SAFLEX: the checkpoint holds no state of `{self.state_key}`; its count of "
                "batches, its validation rows and its gradient start afresh."
            )

    def _settings(self) -> dict[str, Any]:
        """Return the settings that decide what a run computes, builtins all."""
        batch_size = self.val_batch_size
        if self._given_loader is not None:
            batch_size = getattr(self._given_loader, "batch_size", None)
        return {
            "preset": self.preset_name,
            **asdict(self.preset),
            "val_batch_size": batch_size,
            "every_n_steps": self.every_n_steps,
            "start_epoch": self.start_epoch,
            "params": self.params,
            "gates": self.gates,
            "row_evidence": self.row_evidence,
            "seed": self.seed,
        }

    # The end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the validation stream."""
        self._close(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the validation stream; its worker processes end."""
        self._close(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the validation stream."""
        self._close(pl_module)

    def _close(self, pl_module: pl.LightningModule) -> None:
        self._steering.close()
        if isinstance(pl_module, SAflexMixin):
            pl_module._saflex_step = None
