"""What one fit knows about its validation data: the stream, the engine and the direction."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from .batch import check_batch
from .draws import mix_seed
from .engines import RowSubset, Scores, adam_second_moments, as_tuple, evaluate
from .functional import Preset, ReduceSum, check_target
from .gathered import Gathered
from .inputs import unwritten
from .matching import Matching
from .mixin import SAflexMixin
from .plain_loss import LossOptions, mean_cross_entropy
from .sources import count_rows, is_plain
from .state import STATE_VERSION, check_gradient
from .step import SAflexStep
from .strategy_calls import largest_batch, make_reduce_sum, transfer
from .val_batch import call_scores
from .val_gradient import ValidationGradient
from .val_stream import ValidationStream

__all__ = ["Steering"]

_GATES = 1  # keeps the gates' draws apart from the Gumbel noise of the same step


class Steering:
    """Make the validation gradient when it is due, and everything else a training step needs.

    Args:
        preset: The settings.
        seed: Seed of the order of validation rows and of Gumbel noise; None follows torch's.
        batch_size: Validation rows per batch and process; None means the preset's share of the
            first training batch.
        cache: See `ValidationStream`.
        gathered: What is gathered over steps beside the gradient.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        seed: int | None,
        batch_size: int | None,
        cache: bool | str,
        gathered: Gathered,
    ) -> None:
        self.preset = preset
        self.gathered = gathered
        self.gradient = ValidationGradient(preset)
        self._seed = seed
        self._batch_size = batch_size
        self._cache = cache
        self._options = LossOptions()
        self._batches = 0  # training batches seen
        self._draws = 0  # validation batches drawn before the stream was opened
        self._num_classes = 0
        self._parameters: tuple[str, ...] = ()  # names, in the order of the gradient's parts
        self._stream: ValidationStream | None = None
        self._labels_seen = False

    def start(
        self,
        module: pl.LightningModule,
        loader: Any,
        *,
        params: list[str] | None,
        num_workers: int | None,
        keep_batch_size: bool,
        group_names: Sequence[str],
        num_batches: float,
    ) -> None:
        """Take the model and the validation rows of a fit.

        Args:
            module: The module.
            loader: Where validation rows come from.
            params: Name patterns of the matched parameters.
            num_workers: See `ValidationStream`.
            keep_batch_size: Use the loader's own batch size.
            group_names: Name of every group of training rows; read by the gates.
            num_batches: Training batches of the whole training; read by the gates.

        Raises:
            MisconfigurationException: If a gradient from a checkpoint does not fit the module.
        """
        assert isinstance(module, SAflexMixin)
        self._matching = Matching(self.preset.engine, module, params)
        self._rows = RowSubset(module)
        self._loader, self._workers, self._keep_size = loader, num_workers, keep_batch_size
        check_gradient(self.gradient.state_dict(), self._parameters, module)
        self.gradient.to(module.device)
        self._options = self._options.to(module.device)
        if self.gathered.watch is not None:
            rows, head = count_rows(loader), module.saflex_head()
            self.gathered.watch.start(module, head, num_rows=rows, device=module.device)
        if self.gathered.gates is not None:
            self.gathered.gates.start(
                names=group_names, num_batches=num_batches, device=module.device
            )

    def arm(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *, active: bool
    ) -> SAflexStep | None:
        """Count a training batch and, if it is to be refined, return what the module needs.

        Args:
            trainer: The Trainer.
            module: Its module.
            batch: The training batch, on the device.
            active: Whether this training batch may be refined at all.

        Returns:
            The step, or None.
        """
        number, self._batches = self._batches, self._batches + 1
        if not active:
            return None
        assert isinstance(module, SAflexMixin)
        check_batch(batch)
        started = time.perf_counter()
        reduce_sum = make_reduce_sum(trainer)
        if self._stream is None:
            self._stream = self._open(trainer, module, batch)
            self._matching.follow(module)
            if not self._matching.fits(self._parameters):
                self.gradient = ValidationGradient(self.preset)
        seed = mix_seed(self._seed or 0, number, trainer.global_rank)
        if self.gathered.gates is not None:
            generator = torch.Generator().manual_seed(mix_seed(seed, _GATES))
            self.gathered.gates.begin(batch, generator)
        if self.gathered.watch is not None or self.gradient.is_due(number):
            self._look(trainer, module, self._stream, number, reduce_sum)
        return SAflexStep(
            preset=self.preset,
            engine=self._matching.engine,
            tangent=self.gradient.tangent,
            usable=self.gradient.is_usable(number),
            rows=self._rows,
            options=self._options,
            num_classes=self._num_classes,
            batch=batch,
            generator=torch.Generator().manual_seed(seed),
            gathered=self.gathered,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            reduce_sum=reduce_sum,
            seconds=time.perf_counter() - started,
        )

    def _look(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stream: ValidationStream,
        number: int,
        reduce_sum: ReduceSum | None,
    ) -> None:
        """Draw a validation batch; refresh the gradient where due, remember its features."""
        assert isinstance(module, SAflexMixin)
        inputs, target = module.saflex_val_batch(stream.draw())
        forward: Callable[[], Scores] = unwritten(lambda: call_scores(module, inputs), inputs)
        watch = self.gathered.watch
        if watch is not None:
            forward = watch.watched(forward)
        # The Trainer's context sets the default dtype of tensors that a forward makes.
        with trainer.precision_plugin.val_step_context():
            if self.gradient.is_due(number):
                self._matching.follow(module)
                gradient = self._matching.engine.gradient(
                    forward, lambda scores: self._loss(scores, target)
                )
            else:
                gradient = None
                evaluate(module, forward)
        if gradient is not None:
            names = self._matching.names()
            if names != self._parameters:  # an average over others is given up
                self.gradient, self._parameters = ValidationGradient(self.preset), names
            moments = None
            if self.preset.precondition:
                moments = adam_second_moments(self._matching.engine.params, trainer.optimizers)
            self.gradient.refresh(
                number,
                gradient,
                moments,
                reduce_sum=reduce_sum,
                world_size=trainer.world_size,
            )
        if watch is not None:
            watch.add_validation(
                lambda scores: self._loss(scores, target),
                target,
                reduce_sum=reduce_sum,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )

    def end(self, step: SAflexStep) -> None:
        """Take in what a training batch has shown, once its loss is known.

        Later validation gradients are made with the class weights and the label smoothing of that
        loss.

        Args:
            step: What `arm` returned.
        """
        if self.gathered.gates is not None:
            started = time.perf_counter()
            self.gathered.gates.end(self._batches - 1, step.reduce_sum)
            step.seconds += time.perf_counter() - started
        if step.options_seen is None:
            return
        if not self._options.same_kind(step.options_seen):
            self.gradient = ValidationGradient(self.preset)
            if self.gathered.watch is not None:
                self.gathered.watch.bank.clear()  # its residuals are those of the other loss
        self._options = step.options_seen

    def next_batch_number(self) -> int:
        """Return how many training batches were seen.

        Returns:
            The number of the next one, from 0.
        """
        return self._batches

    def close(self) -> None:
        """Let go of the validation loader; its worker processes end."""
        if self._stream is not None:
            self._draws = self._stream.draws
            self._stream.close()
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "batches": self._batches,
            "draws": self._draws if self._stream is None else self._stream.draws,
            "options": tuple(self._options),
            "gradient": self.gradient.state_dict(),
            "parameters": self._parameters,
            "num_classes": self._num_classes,
            "gathered": self.gathered.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], changed: Collection[str] = ()) -> None:
        """Go on where a checkpoint stopped.

        Args:
            state: What `state_dict` returned, checked by `check_state`.
            changed: Settings that are others than those of the run that wrote it. What follows
                from one of them is not taken over.
        """
        if "seed" not in changed:
            self._seed = state["seed"]
        if not {"val_batch_size", "val_batch_ratio"}.intersection(changed):
            self._batch_size = state["batch_size"]
        self._batches = state["batches"]
        self._draws = state["draws"]
        self._options = LossOptions(*state["options"])
        self._num_classes = state["num_classes"]
        if not {"engine", "params"}.intersection(changed):
            self.gradient.load_state_dict(state["gradient"])
            self._parameters = state["parameters"]
        pool = None if "row_evidence" in changed else state["gathered"]["pool"]
        self.gathered.load_state_dict({**state["gathered"], "pool": pool})

    def _open(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any
    ) -> ValidationStream:
        if self._seed is None:
            self._seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**63))
        if self._batch_size is None and is_plain(self._loader):
            rows = count_rows(self._loader) or 1
            if self._keep_size:
                wanted = self._loader.batch_size
            else:
                share = self.preset.val_batch_ratio * largest_batch(trainer, batch)
                wanted = max(1, round(share))
            self._batch_size = min(wanted, rows // trainer.world_size)
        return ValidationStream(
            self._loader,
            lambda val_batch: transfer(trainer, module, val_batch),
            batch_size=self._batch_size,
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self._workers,
            cache=self._cache,
            start=self._draws,
            device=module.device,
        )

    def _loss(self, scores: Scores, target: Tensor | None) -> Tensor:
        """Return the mean validation loss with the options of the training loss."""
        first = as_tuple(scores)[0]
        if target is not None:
            self._num_classes = first.shape[-1]
            # Looking at values waits for the device, so on others than the CPU it is done once.
            check_target(target, first, values=target.device.type == "cpu" or not self._labels_seen)
            self._labels_seen = True
        return mean_cross_entropy(scores, target, self._options)
