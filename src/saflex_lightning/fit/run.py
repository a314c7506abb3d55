"""What one fit holds: the engine, the direction, the evidence, and how a step is made of them."""

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from saflex_lightning.adopt import Adopted, serve
from saflex_lightning.batch import AugmentedBatch, check_rows, read_batch
from saflex_lightning.engines.choose import Matching
from saflex_lightning.engines.direction import adam_second_moments
from saflex_lightning.engines.untouched import extra_pass
from saflex_lightning.evidence.evidence import Evidence
from saflex_lightning.functional.losses import (
    NO_OPTIONS,
    LossOptions,
    Scores,
    as_tuple,
    dense_target,
    is_probabilities,
    looking_is_free,
    mean_cross_entropy,
    widen,
)
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.settings import Settings
from saflex_lightning.module import Edited, Reading
from saflex_lightning.step import Step, contrastive_message
from saflex_lightning.validation.gradient import ValidationGradient
from saflex_lightning.validation.source import count_rows, is_plain
from saflex_lightning.validation.stream import ValidationStream, evaluation, mix_seed

from .checks import check_initialised, check_saved_gradient
from .meter import Meter
from .report import Report, describe_fit

__all__ = ["Fit"]


class Fit:
    """Everything that one fit learns and needs, and its state in checkpoints."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.solves = settings.solves
        self.looks = True  # at values, in every step
        self.report = report
        self.ranks = Ranks()
        self.served: Adopted | Edited  # from `start` on
        self.matching = Matching(settings)
        self.gradient = ValidationGradient(settings)
        self.options = NO_OPTIONS
        self.val_classes: tuple[int, ...] = ()  # of each task of the validation scores
        self.val_probabilities = False  # whether these look like probabilities
        self.evidence: Evidence | None = None
        if settings.row_evidence:
            self.evidence = Evidence()
        self.meter = Meter(settings) if settings.measure_overhead else None
        self.skipped = torch.zeros((), dtype=torch.long)  # steps that met a non-finite number
        self._seed = settings.seed
        self._batch_size = settings.val_batch_size
        self._batches = 0  # training batches seen
        self._looked: int | None = None  # the one before which validation rows were scored last
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
    ) -> None:
        """Take the model and the validation rows of a fit.

        Raises:
            MisconfigurationException: If a gradient from a checkpoint does not fit the module.
        """
        self.ranks = Ranks(trainer.global_rank, trainer.world_size)
        self.looks = looking_is_free(module.device)
        self._loader, self._keep_batch_size = loader, keep_batch_size
        self.report.say_no_engine(self.settings)
        self.served = serve(module)
        check_initialised(module)
        check_saved_gradient(self.gradient.state_dict(), self.matching.names, module)
        self.matching.start(module)
        self.gradient.to(module.device)
        self.options = self.options.to(module.device)
        self.skipped = self.skipped.to(module.device)
        if self.evidence is not None:
            self.evidence.start(group_names, count_rows(loader), module.device)

    # Every training batch

    def arm(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Step | None:
        """Count a training batch and, if it is to be refined, return its step."""
        number, self._batches = self._batches, self._batches + 1
        settings = self.settings
        if self.meter is not None:
            self.meter.begin(number, module.device)
            if self.meter.is_plain(number):
                return None
        if number % settings.every_n_steps or trainer.current_epoch < settings.start_epoch:
            return None
        started = time.perf_counter()
        if isinstance(batch, AugmentedBatch) and (
            self.looks or trainer.fit_loop.batch_idx == 0
        ):  # elsewhere a look waits for the device
            check_rows(batch)
        if self._stream is None:
            self._stream = self._open_stream(trainer, module, batch)
            if not self.solves:
                rank_zero_info(describe_fit(settings, ""))
            if self.matching.names and not self.matching.fits(module, _held(trainer)):
                self.gradient = ValidationGradient(settings)  # a checkpoint's, of other parameters
        seed = mix_seed(self._seed or 0, number, self.ranks.rank)
        step = Step(self, number, batch, torch.Generator().manual_seed(seed))
        is_due = self.solves and self.gradient.is_due(number)
        interval = settings.refresh_every_n_steps
        is_old = self._looked is None or number >= self._looked + interval
        if is_due or (self.evidence is not None and is_old):
            self._look(trainer, module, self._stream, number, is_due=is_due)
            self._looked = number
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
        if step.tasks and not step.is_masked and not step.is_contrastive:
            self.report.tell_of_unions()
        if step.failed is not None:
            self.skipped += step.failed
        else:  # the gradient was made with other options than the loss has
            self.gradient = ValidationGradient(self.settings)
            if self.evidence is not None:
                self.evidence.forget()
            self._looked = None
        self.options = step.options
        step.seconds += time.perf_counter() - started
        return step.failed is not None and self.looks and bool(step.failed)

    def _look(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stream: ValidationStream,
        number: int,
        *,
        is_due: bool,
    ) -> None:
        """Draw a validation batch; refresh the gradient where due, remember its scores."""
        with evaluation(trainer, module, stream) as batch:
            reading = self.served.read(batch)
            run = partial(self._score, reading)

            # Looking at values waits for the device, so on others than the CPU it is done once.
            look = self.looks or not self.val_classes

            def loss(scores: Scores) -> Tensor:
                check = "values" if look else "shapes"
                return mean_cross_entropy(scores, reading.target, self.options, check=check)

            held = _held(trainer)
            if is_due and not self.matching.fits(module, held):
                self._choose_engine(module, partial(self._score, reading.copied()), held)
            if self.evidence is not None:
                run = partial(self._remember, number, run, reading, loss)
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
        tasks = (scores,) if isinstance(scores, Tensor) else as_tuple(scores)
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

    def _remember(
        self,
        number: int,
        run: Callable[[], Scores],
        reading: Reading,
        loss: Callable[[Scores], Tensor],
    ) -> Scores:
        """Return the scores of a pass over validation rows, having remembered them."""
        assert self.evidence is not None
        scores = run()
        if reading.target is None or not isinstance(scores, Tensor):
            raise MisconfigurationException(contrastive_message())
        logits = widen(scores.detach()).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(logits), logits)
        labels = dense_target(reading.target, logits.shape[-1], logits.dtype)
        rows = (logits.detach(), len(logits) * gradient, labels)
        self.evidence.remember(number, *rows, self.ranks)
        return scores

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
            "looked": self._looked,
            "evidence": self.evidence and self.evidence.state_dict(),
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
        self._looked = state["looked"]
        if self.evidence is not None:
            if state["evidence"] is None:
                self._looked = None  # no validation rows were remembered
            else:
                self.evidence.load_state_dict(state["evidence"])

    def _open_stream(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any
    ) -> ValidationStream:
        if self._seed is None:
            self._seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**63))
        if self._batch_size is None and is_plain(self._loader):
            rows = count_rows(self._loader) or 1
            if self._keep_batch_size:
                wanted = self._loader.batch_size
            else:
                share = self.settings.val_batch_ratio * _largest_batch(trainer, module, batch)
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


def _largest_batch(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> float:
    """Return the rows of this training batch on the rank that has the most; every rank must ask."""
    size = torch.tensor(float(_rows_of(module, batch)), device=trainer.strategy.root_device)
    largest = trainer.strategy.reduce(size, reduce_op="max")
    assert isinstance(largest, Tensor)
    return largest.item()


def _rows_of(module: pl.LightningModule, batch: Any) -> int:
    """Return the labels of a batch, or the rows of its first tensor where it is read otherwise.

    The tensors of a batch of graphs have a row for each node.
    """
    for read in (read_batch, getattr(module, "saflex_val_batch", read_batch)):
        with suppress(Exception):  # the hook is for validation batches, of maybe another layout
            _, target = read(batch)
            if isinstance(target, Tensor):
                return len(target)
    try:
        graphs = getattr(batch, "num_graphs", None)  # of torch_geometric, whose rows are nodes
        if graphs is not None:
            return int(graphs)
        with warnings.catch_warnings():  # of several sizes that it finds
            warnings.simplefilter("ignore")
            return extract_batch_size(batch)
    except MisconfigurationException as error:
        raise MisconfigurationException(
            "Expected a training batch whose rows can be counted, to draw a share of as many "
            f"validation rows, but got {type(batch).__name__}. Pass "
            "`SAflexCallback(val_batch_size=...)`."
        ) from error
