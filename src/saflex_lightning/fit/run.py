"""What one fit holds: the engine, the direction, the evidence, and how a step is made of them."""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from saflex_lightning.adopt import Adopted, serve
from saflex_lightning.batch import AugmentedBatch, check_rows
from saflex_lightning.engines.choose import Matching
from saflex_lightning.engines.direction import adam_second_moments
from saflex_lightning.engines.head import LastLayer
from saflex_lightning.engines.last_layer import find_last_layer
from saflex_lightning.engines.untouched import extra_pass
from saflex_lightning.evidence.gates import Gates
from saflex_lightning.evidence.memory import ValidationMemory
from saflex_lightning.evidence.rows import RowWeights
from saflex_lightning.functional.losses import (
    NO_OPTIONS,
    LossOptions,
    Scores,
    dense_target,
    is_probabilities,
    mean_cross_entropy,
)
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.settings import Settings
from saflex_lightning.module import Edited, Reading
from saflex_lightning.step import Step
from saflex_lightning.validation.gradient import ValidationGradient
from saflex_lightning.validation.source import count_rows, is_plain
from saflex_lightning.validation.stream import ValidationStream, evaluation, mix_seed

from .checks import check_initialised, check_saved_gradient
from .report import Report, describe_fit

__all__ = ["Fit"]

_GATES = 1  # keeps the gates' draws apart from the Gumbel noise of the same step


class Fit:
    """Everything that one fit learns and needs, and its state in checkpoints."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.report = report
        self.ranks = Ranks()
        self.served: Adopted | Edited  # from `start` on
        self.matching = Matching(settings)
        self.gradient = ValidationGradient(settings)
        self.options = NO_OPTIONS
        self.val_classes: tuple[int, ...] = ()  # of each task of the validation scores
        self.val_probabilities = False  # whether these look like probabilities
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
        self._stream: ValidationStream | None = None

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
        self.served = serve(module)
        check_initialised(module)
        check_saved_gradient(self.gradient.state_dict(), self.matching.names, module)
        self.matching.start(module)
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
        if isinstance(batch, AugmentedBatch) and (
            batch.augmented.device.type == "cpu" or trainer.fit_loop.batch_idx == 0
        ):  # elsewhere a look waits for the device
            check_rows(batch)
        if self._stream is None:
            self._stream = self._open_stream(trainer, batch)
            if self.matching.names and not self.matching.fits(module, _held(trainer)):
                self.gradient = ValidationGradient(settings)  # a checkpoint's, of other parameters
        seed = mix_seed(self._seed or 0, number, self.ranks.rank)
        gate_draws = None
        if self.gates is not None:
            gate_draws = torch.Generator().manual_seed(mix_seed(seed, _GATES))
        step = Step(self, number, batch, torch.Generator().manual_seed(seed), gate_draws)
        is_due = self.gradient.is_due(number)
        if self.memory is not None or is_due:
            self._look(trainer, module, self._stream, number, is_due=is_due)
        step.seconds = time.perf_counter() - started
        return step

    def end(self, step: Step) -> bool:
        """Take in what a training batch has shown; say whether it met a non-finite number.

        Later validation gradients are made with the class weights and the label smoothing of its
        loss. False where that number could not be told without waiting for the device.
        """
        step.batch = None
        step.calls.clear()  # and the graph with them
        if step.options is None:
            return False
        started = time.perf_counter()
        if step.tasks and step.tasks[0].augmented is None and not step.is_contrastive:
            self.report.tell_of_unions()
        if self.gates is not None:
            for task in step.tasks:
                assert task.features is not None
                assert task.gated is not None
                labels = dense_target(task.target, task.probs.shape[-1], task.probs.dtype)
                evidence = (task.features, task.probs, labels, task.gated)
                with torch.no_grad():
                    self.gates.update(step.number, *evidence, step.options, self.ranks)
        if step.finite is not None:
            self.skipped += ~step.finite
        else:  # the gradient was made with other options than the loss has
            self.gradient = ValidationGradient(self.settings)
            if self.memory is not None:
                self.memory.clear()  # its residuals are those of the other loss
        self.options = step.options
        step.seconds += time.perf_counter() - started
        return step.finite is not None and not step.finite.is_cuda and not bool(step.finite)

    def _look(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stream: ValidationStream,
        number: int,
        *,
        is_due: bool,
    ) -> None:
        """Draw a validation batch; refresh the gradient where due, remember its features."""
        with evaluation(trainer, module, stream) as batch:
            reading = self.served.read(batch)
            run = partial(self._score, reading)

            # Looking at values waits for the device, so on others than the CPU it is done once.
            look = module.device.type == "cpu" or not self.val_classes

            def loss(scores: Scores) -> Tensor:
                check = "values" if look else "shapes"
                return mean_cross_entropy(scores, reading.target, self.options, check=check)

            held = _held(trainer)
            if is_due and not self.matching.fits(module, held):
                self._choose_engine(module, partial(self._score, reading.copied()), held)
            if self.memory is not None:
                last = self._watched_layer(module, reading)
                run = self.memory.watching(run, loss, lambda: reading.target, last, self.ranks)
            if not is_due:
                with torch.no_grad(), extra_pass(module):
                    run()
                return
            gradient = self.matching.engine.gradient(run, loss)
        moments = None
        if self.settings.precondition:
            moments = adam_second_moments(self.matching.engine.params, trainer.optimizers)
        self.gradient.update(number, self.ranks.mean(gradient), moments)

    def _score(self, reading: Reading) -> Scores:
        """Return the scores of a validation batch."""
        scores = reading.run()
        tasks = (scores,) if isinstance(scores, Tensor) else scores
        if not self.val_classes:  # looking at values waits for the device
            self.val_probabilities = all(map(is_probabilities, tasks))
        self.val_classes = tuple(task.shape[-1] for task in tasks)
        return scores

    def _choose_engine(
        self, module: pl.LightningModule, run: Callable[[], Scores], held: Sequence[Tensor]
    ) -> None:
        """Choose an engine for what is trained now; an average over others is given up."""
        is_first = not self.matching.names
        if self.matching.choose(module, run, self.served.head(), held):
            self.gradient = ValidationGradient(self.settings)
        if is_first:
            rank_zero_info(describe_fit(self.settings, self.matching.describe()))

    def _watched_layer(self, module: pl.LightningModule, reading: Reading) -> LastLayer:
        """Return the layer whose features are remembered, found at the first validation batch."""
        if reading.is_contrastive:
            raise MisconfigurationException(
                f"Expected validation batches with class labels for {self.memory_for}, but the "
                "target is None, as for contrastive scores. Leave that setting out."
            )
        if self.last_layer is None:
            run, head = partial(self._score, reading), self.served.head()
            self.last_layer = find_last_layer(module, run, head, wanted_by=self.memory_for)
        return self.last_layer

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
            "matching": self.matching.state_dict(),
            "val_classes": self.val_classes,
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
        self.val_classes = tuple(state["val_classes"])
        self.skipped = torch.tensor(state["skipped_steps"])
        if not {"engine", "params"}.intersection(changed):
            self.gradient.load_state_dict(state["gradient"])
            self.matching.load_state_dict(state["matching"])
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
        graphs = getattr(batch, "num_graphs", None)  # of torch_geometric, whose rows are nodes
        rows = float(extract_batch_size(batch) if graphs is None else graphs)
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
