"""One refined training step: the derivative of its scores, the solve, and the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .batch import replace_rows, row_field
from .engines.engine import Finish
from .engines.head import Recording, same_values
from .engines.untouched import unwritten
from .evidence.gates import GatedRows
from .evidence.products import rescale_weights
from .functional.contrastive import contrastive_target
from .functional.losses import (
    LossOptions,
    Scores,
    check_target,
    dense_target,
    mean_cross_entropy,
    weighted_cross_entropy,
    widen,
)
from .functional.ranks import Ranks
from .functional.solve import SAflexSolution, solve

if TYPE_CHECKING:
    from .fit.run import Fit

__all__ = ["Step"]


@dataclass
class Call:
    """What one forward returned, how it moves, and the features behind it."""

    scores: tuple[Tensor, ...]
    jvp: tuple[Tensor, ...]
    features: Tensor | None
    is_used: bool = False


@dataclass(frozen=True)
class SolvedTask:
    """One task of the loss: its solution, and what it was solved from."""

    solution: SAflexSolution
    target: Tensor
    augmented: Tensor | None
    probs: Tensor
    features: Tensor | None
    gated: GatedRows | None


class Step:
    """What the callback hands to the module for one training batch, and what comes back.

    Args:
        fit: What the fit holds.
        number: Of the training batch.
        batch: The training batch.
        generator: Source of Gumbel noise, of its own on every rank.
        gate_draws: Source of what the gates draw; None without gates.
    """

    def __init__(
        self,
        fit: "Fit",
        number: int,
        batch: Any,
        generator: torch.Generator,
        gate_draws: torch.Generator | None = None,
    ) -> None:
        self.fit = fit
        self.number = number
        self.batch = batch
        self.generator = generator
        self.gate_draws = gate_draws
        self.seconds = 0.0
        self.calls: list[Call] = []
        self.tasks: Sequence[SolvedTask] = ()
        self.options: LossOptions | None = None  # of the loss, once it was asked for
        self.is_contrastive = False
        self.finite: Tensor | None = None  # whether every task was solved without a NaN
        self._open: tuple[Finish, Recording | None] | None = None
        # Rows that give way to the clean rows they were made from, and the row in each place.
        self.rejected = fit.gates and gate_draws and fit.gates.draw(batch, gate_draws)
        self._places: Tensor | None = None
        if self.rejected is not None:
            here = torch.arange(len(self.rejected), device=self.rejected.device)
            self._places = torch.where(self.rejected, batch.source, here)

    @property
    def batch_size(self) -> int:
        """Rows of the training batch that were solved."""
        return len(self.tasks[0].target)

    def forward(self, score: Callable[..., Scores], inputs: Any, kwargs: Any) -> Scores:
        """Return the scores of the training forward; what is extra comes before it."""
        inputs, kwargs = self.replaced((inputs, kwargs))
        self.begin(partial(score, *inputs, **kwargs), (inputs, kwargs))
        scores = score(*inputs, **kwargs)
        self.end(scores)
        return scores

    def replaced(self, values: Any) -> Any:
        """Return values of the batch's rows, with rejected rows as those they were made from."""
        return values if self._places is None else replace_rows(values, self._places)

    def begin(self, run: Callable[[], Scores], inputs: Any) -> None:
        """Do what must come before the training forward; ``run`` is for passes beside it."""
        started, fit = time.perf_counter(), self.fit
        if fit.matching.engine.repeats_forward:
            run = unwritten(run, inputs)
        if fit.memory is not None and not all(call.is_used for call in self.calls):
            raise MisconfigurationException(
                f"Expected `saflex_loss` to follow each `saflex_forward` with {fit.memory_for}, "
                "but two forwards came before a loss. Compute the loss of the first scores before "
                "the second forward, and scores that need none with `self(...)`."
            )
        finish = fit.matching.engine.jvp(run, fit.gradient.direction)
        self._open = finish, fit.last_layer and fit.last_layer.record()
        self.seconds += time.perf_counter() - started

    def end(self, scores: Scores) -> None:
        """Keep the scores of the training forward with their derivative."""
        started = time.perf_counter()
        assert self._open is not None
        (finish, recording), self._open = self._open, None
        features = None if recording is None else widen(recording.take(scores))
        self.calls.append(Call(_tasks(scores), _tasks(finish.of(scores)), features))
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Give up a forward that failed."""
        if self._open is not None:
            finish, recording = self._open
            finish.close()
            if recording is not None:
                recording.close()
            self._open = None

    def loss(
        self,
        logits: Scores,
        target: Tensor | None,
        options: LossOptions,
        augmented: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Solve every task, keep what was learned, and return the mean of their losses.

        It is plain cross-entropy where the validation gradient was made with other options.
        """
        started = time.perf_counter()
        self.options, self.is_contrastive = options, target is None
        given = _tasks(logits)
        call = self._call_of(given)
        if self.fit.val_probabilities:
            self.fit.report.say_probabilities(given)
        if not self.fit.options.same_kind(options):
            return mean_cross_entropy(logits, target, options)
        tasks = [
            self._solve(scores, jvp, call.features, target, options, augmented, group, index)
            for scores, jvp in zip(given, call.jvp, strict=True)
        ]
        losses, self.tasks = zip(*tasks, strict=True)
        self.finite = torch.stack([task.solution.finite for task in self.tasks]).all()
        self.seconds += time.perf_counter() - started
        return torch.stack(losses).mean()

    def _solve(
        self,
        scores: Tensor,
        jvp: Tensor,
        features: Tensor | None,
        target: Tensor | None,
        options: LossOptions,
        augmented: Tensor | None,
        group: Tensor | None,
        index: Tensor | None,
    ) -> tuple[Tensor, SolvedTask]:
        """Return the loss of one task, and what was learned."""
        fit, size = self.fit, len(scores)
        contrastive = target is None
        target = contrastive_target(scores) if target is None else target
        if self._places is not None:
            target = target[self._places]
        # Where each process scores its own pairs alone, a column means something else on each.
        own_pairs = contrastive and scores.shape[0] == scores.shape[1]
        check_target(target, scores, values=target.device.type == "cpu")
        mask = row_field(self.batch, "augmented", augmented, size)
        gated = None
        if fit.gates is not None and self.gate_draws is not None:
            every = torch.ones(size, dtype=torch.bool, device=scores.device)
            group = row_field(self.batch, "group", group, size)
            mask = every if mask is None else mask
            gated = fit.gates.take(mask, group, self.rejected, self.gate_draws)
            mask = gated.augmented
        with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
            wide = torch.promote_types(scores.dtype, torch.float32)
            probs = torch.softmax(scores, -1, dtype=wide)
            finite = scores.isfinite().all(-1)
            usable = fit.gradient.is_usable(self.number)
            usable = usable & (finite if mask is None else finite | ~mask).all()
            solution = solve(
                jvp.masked_fill(~usable, torch.nan),  # the solve then skips itself
                probs,
                target,
                mask,
                fit.settings,
                balance_classes=not contrastive,
                options=options,
                generator=self.generator,
                ranks=Ranks() if own_pairs else fit.ranks,
            )
            weights = solution.weights
            if fit.rows is not None:
                assert features is not None
                every = torch.ones_like(weights, dtype=torch.bool)
                chosen = every if mask is None else mask
                index = row_field(self.batch, "index", index, size)
                if index is not None and self._places is not None:
                    index = index[self._places]
                labels = dense_target(target, probs.shape[-1], probs.dtype)
                factors = fit.rows.factors(features, labels, chosen, index, fit.ranks)
                weights = rescale_weights(weights, factors, chosen, fit.ranks)
            if fit.gates is not None and gated is not None:
                weights = fit.gates.reweigh(weights, gated, fit.ranks)
            solution = replace(solution, weights=weights)
            share = weights
            if options.class_weight is not None and target.ndim == 1:
                share = share * options.class_weight[target.long()]  # as F.cross_entropy averages
            total = fit.ranks.sum(share.sum())
        loss = weighted_cross_entropy(
            scores, solution.soft_labels, weights, **options._asdict(), total=total
        )
        return fit.ranks.size * loss, SolvedTask(solution, target, mask, probs, features, gated)

    def _call_of(self, logits: tuple[Tensor, ...]) -> Call:
        """Return the forward that made the logits.

        Raises:
            MisconfigurationException: If there was none.
            ValueError: If they are none's, changed, or scored over other classes than validation.
        """
        if not self.calls:
            raise MisconfigurationException(
                "Expected `self.saflex_forward(...)` to run before `self.saflex_loss(...)` in "
                "`training_step`, but it did not. Compute the logits with `saflex_forward`."
            )
        for call in self.calls:
            if len(logits) == len(call.scores) and all(map(same_values, logits, call.scores)):
                call.is_used = True
                break
        else:
            shapes = [tuple(scores.shape) for scores in self.calls[0].scores]
            found = [tuple(scores.shape) for scores in logits]
            raise ValueError(
                f"Expected `logits` as one of the {len(self.calls)} calls of `saflex_forward` in "
                f"this step returned them, of shape {shapes}, but got others, of shape {found}. "
                "Pass them on unchanged."
            )
        classes, expected = logits[0].shape[-1], self.fit.val_classes
        if len(logits) < len(expected):
            raise ValueError(
                f"Expected the module to return as many score tensors in training as in evaluation,"
                f" {len(expected)}, but got {len(logits)}. Return the logits alone from "
                "`saflex_scores` in both modes."
            )
        one = len(logits) == len(expected) == 1  # the classes of proxy tasks are the batch's own
        if one and classes != expected[0]:
            raise ValueError(
                f"Expected the training batch to be scored over {expected[0]} classes "
                f"like the validation batch, but got {classes}. Use one head for both."
            )
        return call


def _tasks(scores: Scores) -> tuple[Tensor, ...]:
    return (scores,) if isinstance(scores, Tensor) else tuple(scores)
