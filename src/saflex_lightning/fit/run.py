"""What one fit holds: the engine, the direction, the evidence, and how a step is made of them."""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from saflex_lightning.batch import check_batch
from saflex_lightning.engines.choose import (
    describe_engine,
    find_last_layer,
    make_engine,
    restore_engine,
)
from saflex_lightning.engines.direction import adam_second_moments
from saflex_lightning.engines.engine import Engine
from saflex_lightning.engines.head import LastLayer
from saflex_lightning.engines.parameters import select_parameters
from saflex_lightning.engines.untouched import full_precision
from saflex_lightning.evidence.gates import Gates
from saflex_lightning.evidence.memory import ValidationMemory
from saflex_lightning.evidence.rows import RowWeights
from saflex_lightning.functional.losses import (
    NO_OPTIONS,
    LossOptions,
    Scores,
    as_tuple,
    check_target,
    dense_target,
    mean_cross_entropy,
    widen,
)
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.settings import Settings
from saflex_lightning.module import SAflexMixin
from saflex_lightning.step import Step
from saflex_lightning.validation.gradient import ValidationGradient
from saflex_lightning.validation.source import count_rows, is_plain
from saflex_lightning.validation.stream import (
    ValidationStream,
    evaluation,
    mix_seed,
    move_batch,
)

from .checks import check_saved_gradient
from .report import describe_fit

__all__ = ["Fit"]

_GATES, _EVALUATION = 1, 2  # keep these draws apart from the Gumbel noise of the same step


class Fit:
    """Everything that one fit learns and needs, and its state in checkpoints."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ranks = Ranks()
        self.engine: Engine
        self.is_partial = False  # whether one layer is matched, which schedules do not widen
        self.gradient = ValidationGradient(settings)
        self.options = NO_OPTIONS
        self.num_classes = 0  # of the validation scores
        self.memory = ValidationMemory() if settings.gates or settings.row_evidence else None
        self.memory_for = "`gates=True`" if settings.gates else "`row_evidence=True`"
        self.gates = Gates(self.memory) if settings.gates and self.memory else None
        self.rows = RowWeights(self.memory) if settings.row_evidence and self.memory else None
        self.last_layer: LastLayer | None = None
        self.skipped = torch.zeros((), dtype=torch.long)  # steps that met a non-finite number
        self._seed = settings.seed
        self._batch_size = settings.val_batch_size
        self._batches = 0  # training batches seen
        self._draws = 0  # validation batches drawn before the stream was opened
        self._engine_name = ""  # of the engine in use, once one is
        self._matched: tuple[str, ...] = ()  # names, in the order of the gradient's parts
        self._stream: ValidationStream | None = None
        self._labels_seen = False

    def start(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loader: Any,
        *,
        keep_batch_size: bool,
        group_names: Sequence[str],
        num_batches: float,
    ) -> None:
        """Take the model and the validation rows of a fit.

        Raises:
            MisconfigurationException: If a gradient from a checkpoint does not fit the module.
        """
        self.ranks = Ranks(trainer.global_rank, trainer.world_size)
        self._loader, self._keep_batch_size = loader, keep_batch_size
        check_saved_gradient(self.gradient.state_dict(), self._matched, module)
        if self._engine_name:
            self.engine = restore_engine(self._engine_name, module, self._matched)  # type: ignore[arg-type]
        self.gradient.to(module.device)
        self.options = self.options.to(module.device)
        self.skipped = self.skipped.to(module.device)
        if self.memory is not None:
            self.memory.start(count_rows(loader), module.device)
        if self.gates is not None:
            self.gates.start(group_names, num_batches, module.device)

    # Every training batch

    def arm(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Step | None:
        """Count a training batch and, if it is to be refined, return its step."""
        number, self._batches = self._batches, self._batches + 1
        settings = self.settings
        if number % settings.every_n_steps or trainer.current_epoch < settings.start_epoch:
            return None
        started = time.perf_counter()
        check_batch(batch)
        if self._stream is None:
            self._stream = self._open_stream(trainer, batch)
            if self._engine_name and not self._engine_fits(trainer, module):
                self.gradient = ValidationGradient(settings)  # a checkpoint's, of other parameters
        seed = mix_seed(self._seed or 0, number, self.ranks.rank)
        step = Step(
            self,
            number,
            batch,
            generator=torch.Generator().manual_seed(seed),
            gate_draws=torch.Generator().manual_seed(mix_seed(seed, _GATES)),
        )
        if self.memory is not None or self.gradient.is_due(number):
            self._look(trainer, module, self._stream, number)
        step.seconds = time.perf_counter() - started
        return step

    def end(self, step: Step) -> None:
        """Take in what a training batch has shown, once its loss is known.

        Later validation gradients are made with the class weights and the label smoothing of that
        loss.
        """
        if step.options is None:
            return
        started = time.perf_counter()
        if self.gates is not None:
            for task in step.tasks:
                assert task.features is not None
                assert task.gated is not None
                labels = dense_target(task.target, task.probs.shape[-1], task.probs.dtype)
                evidence = (task.features, task.probs, labels, task.gated)
                with torch.no_grad():
                    self.gates.update(step.number, *evidence, step.options, self.ranks)
        if step.tasks:
            self.skipped += ~step.finite
        if not self.options.same_kind(step.options):
            self.gradient = ValidationGradient(self.settings)
            if self.memory is not None:
                self.memory.clear()  # its residuals are those of the other loss
        self.options = step.options
        step.seconds += time.perf_counter() - started

    def _look(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stream: ValidationStream,
        number: int,
    ) -> None:
        """Draw a validation batch; refresh the gradient where due, remember its features."""
        assert isinstance(module, SAflexMixin)
        seed = mix_seed(self._seed or 0, stream.draws, self.ranks.rank, _EVALUATION)
        batch = stream.draw()
        with evaluation(trainer, module, seed):
            inputs, target = module.saflex_val_batch(move_batch(trainer, module, batch))
            run = partial(_score, module, inputs)

            def loss(scores: Scores) -> Tensor:
                return self._loss(scores, target)

            is_due = self.gradient.is_due(number)
            if is_due and not (self._engine_name and self._engine_fits(trainer, module)):
                # A forward may write in its inputs, and these are read again.
                inputs = apply_to_collection(inputs, Tensor, torch.clone)
                self._choose_engine(trainer, module, partial(_score, module, inputs))
            if self.memory is not None:
                run = self._remembering(module, run, loss, target)
            if not is_due:
                with torch.no_grad(), full_precision(module.device.type):
                    run()
                return
            gradient = self.engine.gradient(run, loss)
        moments = None
        if self.settings.precondition:
            moments = adam_second_moments(self.engine.params, trainer.optimizers)
        self.gradient.update(number, self.ranks.mean(gradient), moments)

    def _remembering(
        self,
        module: pl.LightningModule,
        run: Callable[[], Scores],
        loss: Callable[[Scores], Tensor],
        target: Tensor | None,
    ) -> Callable[[], Scores]:
        """Return a pass that also remembers the features and residuals of the validation rows."""
        if target is None:
            raise MisconfigurationException(
                f"Expected validation batches with class labels for {self.memory_for}, but the "
                "target is None, as for contrastive scores. Leave that setting out."
            )
        assert isinstance(module, SAflexMixin)
        if self.last_layer is None:
            head = module.saflex_head()
            self.last_layer = find_last_layer(module, run, head, wanted_by=self.memory_for)
        last, memory = self.last_layer, self.memory
        assert memory is not None

        def run_and_remember() -> Scores:
            recording = last.record()
            try:
                scores = run()
            finally:
                recording.close()
            features = widen(recording.take(scores))
            assert isinstance(scores, Tensor)
            logits = widen(scores.detach()).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(logits), logits)
            labels = dense_target(target, logits.shape[-1], logits.dtype)
            memory.add(features, len(logits) * gradient, labels, self.ranks)
            return scores

        return run_and_remember

    def _loss(self, scores: Scores, target: Tensor | None) -> Tensor:
        """Return the mean validation loss with the options of the training loss."""
        first = as_tuple(scores)[0]
        if target is not None:
            self.num_classes = first.shape[-1]
            # Looking at values waits for the device, so on others than the CPU it is done once.
            check_target(target, first, values=target.device.type == "cpu" or not self._labels_seen)
            self._labels_seen = True
        return mean_cross_entropy(scores, target, self.options)

    # The engine

    def _choose_engine(
        self, trainer: pl.Trainer, module: pl.LightningModule, run: Callable[[], Scores]
    ) -> None:
        """Build the engine for what is trained now; an average over other parameters is given up."""
        assert isinstance(module, SAflexMixin)
        self.engine = make_engine(
            self.settings.engine,
            module,
            run,
            params=self.settings.params,
            head=module.saflex_head(),
            held=_held(trainer),
        )
        if not self._engine_name:
            rank_zero_info(describe_fit(self.settings, describe_engine(self.engine, module)))
        self._engine_name = self.engine.name
        table = {parameter: name for name, parameter in module.named_parameters()}
        names = tuple(table[parameter] for parameter in self.engine.params)
        everything = select_parameters(module, self.settings.params, _held(trainer))
        self.is_partial = self.engine.name == "head" or len(names) < len(everything)
        if names != self._matched:
            self.gradient, self._matched = ValidationGradient(self.settings), names

    def _engine_fits(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Say whether the engine still matches what is trained, as schedules may change that."""
        table = dict(module.named_parameters(remove_duplicate=False))
        matched = [table[name] for name in self._matched]
        expected = self.engine.params  # of the head engine without a bias that is frozen
        if not self.is_partial:
            expected = select_parameters(module, self.settings.params, _held(trainer))
        return list(map(id, matched)) == list(map(id, expected)) and all(
            parameter.requires_grad for parameter in matched
        )

    # The end, and checkpoints

    def close(self) -> None:
        """Let go of the validation loader; its worker processes end."""
        if self._stream is not None:
            self._draws = self._stream.draws
            self._stream.close()
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, equal on every rank."""
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "batches": self._batches,
            "draws": self._draws if self._stream is None else self._stream.draws,
            "options": tuple(self.options),
            "gradient": self.gradient.state_dict(),
            "engine": self._engine_name,
            "matched": self._matched,
            "partial": self.is_partial,
            "num_classes": self.num_classes,
            "skipped_steps": int(self.skipped),
            "memory": self.memory and self.memory.state_dict(),
            "gates": self.gates and self.gates.state_dict(),
            "rows": self.rows and self.rows.averages.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], changed: Collection[str] = ()) -> None:
        """Go on where a checkpoint stopped.

        What follows from a setting that has ``changed`` since is not taken over.
        """
        if "seed" not in changed:
            self._seed = state["seed"]
        if not {"val_batch_size", "val_batch_ratio"}.intersection(changed):
            self._batch_size = state["batch_size"]
        self._batches, self._draws = state["batches"], state["draws"]
        self.options = LossOptions(*state["options"])
        self.num_classes = state["num_classes"]
        self.skipped = torch.tensor(state["skipped_steps"])
        if not {"engine", "params"}.intersection(changed):
            self.gradient.load_state_dict(state["gradient"])
            self._engine_name, self._matched = state["engine"], tuple(state["matched"])
            self.is_partial = state["partial"]
        parts: dict[str, Any] = {
            "memory": self.memory,
            "gates": self.gates,
            "rows": self.rows and self.rows.averages,
        }
        for name, part in parts.items():
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])

    def _open_stream(self, trainer: pl.Trainer, batch: Any) -> ValidationStream:
        if self._seed is None:
            self._seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**63))
        if self._batch_size is None and is_plain(self._loader):
            rows = count_rows(self._loader) or 1
            if self._keep_batch_size:
                wanted = self._loader.batch_size
            else:
                share = self.settings.val_batch_ratio * _largest_batch(trainer, batch)
                wanted = max(1, round(share))
            self._batch_size = min(wanted, rows // trainer.world_size)
        return ValidationStream(
            self._loader,
            batch_size=self._batch_size,
            seed=self._seed,
            ranks=self.ranks,
            start=self._draws,
        )


def _score(module: SAflexMixin, inputs: Any) -> Scores:
    """Return the scores of the inputs of a validation batch."""
    if isinstance(inputs, dict):
        return module.saflex_scores(**inputs)
    return module.saflex_scores(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def _held(trainer: pl.Trainer) -> list[Tensor]:
    """Return the parameters that an optimizer holds: the others do not move."""
    return [
        parameter
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _largest_batch(trainer: pl.Trainer, batch: Any) -> float:
    """Return the rows of this training batch on the rank that has the most; every rank must ask."""
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
