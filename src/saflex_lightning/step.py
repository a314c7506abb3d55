"""One refined training step: the derivative of its scores, the solve, and the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .batch import AugmentedBatch, row_field
from .engines.engine import Finish
from .engines.head import same_values
from .engines.untouched import unwritten
from .evidence.evidence import GatheredRows
from .functional.contrastive import contrastive_target
from .functional.losses import (
    LossOptions,
    Scores,
    as_tuple,
    check_target,
    check_tasks,
    dense_target,
    mean_cross_entropy,
    weighted_cross_entropy,
    widen,
)
from .functional.ranks import Ranks
from .functional.solve import SAflexSolution, solve

if TYPE_CHECKING:
    from .fit.run import Fit

__all__ = ["SolvedTask", "Step", "StepRows"]


@dataclass
class Call:
    """What one forward returned, and how it moves where that is measured."""

    scores: tuple[Tensor, ...]
    jvp: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        self._versions = [scores._version for scores in self.scores]

    def made(self, logits: Sequence[Tensor]) -> bool:
        """Say whether logits are these scores, or copies, as they were."""
        return (
            len(logits) == len(self.scores)
            and all(map(same_values, logits, self.scores))
            and [scores._version for scores in self.scores] == self._versions
        )


class StepRows(NamedTuple):
    """What one step tells of each of its rows, on the device where they are.

    Attributes:
        index: Identity across epochs, ``(rows,)`` int64; None where nobody tells.
        group: What made it, ``(rows,)`` int64; None where nobody tells.
        target: Its label, ``(rows,)`` integers or ``(rows, classes)``; None for contrastive scores.
        suggested: The class that its scores ask for, ``(rows,)`` int64, -1 where that is not known;
            None where nothing is suggested.
        beliefs: Posterior of its label, averaged over its visits where ``index`` is there,
            ``(rows,)``; None without evidence.
        weights: Its weight, ``(rows,)``.
        shown: Whether it came as an augmented row, ``(rows,)`` bool.
    """

    index: Tensor | None  # pyright: ignore[reportIncompatibleMethodOverride]  as in `RowEvidence`
    group: Tensor | None
    target: Tensor | None
    suggested: Tensor | None
    beliefs: Tensor | None
    weights: Tensor
    shown: Tensor


@dataclass(frozen=True)
class SolvedTask:
    """One task of the loss: its solution, and what it was solved from."""

    solution: SAflexSolution
    gathered: GatheredRows | None
    told: StepRows
    target: Tensor
    augmented: Tensor
    label_rule: str

    def rows(self) -> StepRows:
        """Return what the step tells of each of its rows."""
        told = self.told._replace(weights=self.solution.weights)
        if self.gathered is not None:
            return told._replace(suggested=self.gathered.suggested, beliefs=self.gathered.beliefs)
        if self.label_rule == "keep":
            return told
        return told._replace(suggested=self.solution.soft_labels.argmax(-1))


class Step:
    """What the callback hands to the module for one training batch, and what comes back.

    Args:
        fit: What the fit holds.
        number: Of the training batch.
        batch: The training batch.
        generator: Source of Gumbel noise, of its own on every rank.
    """

    def __init__(
        self,
        fit: "Fit",
        number: int,
        batch: Any,
        generator: torch.Generator,
    ) -> None:
        self.fit = fit
        self.number = number
        self.batch = batch
        self.generator = generator
        self.seconds = 0.0
        self.calls: list[Call] = []
        self.tasks: Sequence[SolvedTask] = ()
        self.options: LossOptions | None = None  # of the loss, once it was asked for
        self.is_contrastive = False
        self.is_masked = True  # whether something tells augmented rows from clean ones
        self.failed: Tensor | None = None  # whether some task met a non-finite number
        self._open: Finish | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the training batch that were solved."""
        return len(self.tasks[0].target)

    def forward(self, score: Callable[..., Scores], inputs: Any, kwargs: Any) -> Scores:
        """Return the scores of the training forward; what is extra comes before it."""
        self.begin(partial(score, *inputs, **kwargs), (inputs, kwargs))
        scores = score(*inputs, **kwargs)
        self.end(scores)
        return scores

    def begin(self, run: Callable[[], Scores], inputs: Any) -> None:
        """Do what must come before the training forward; ``run`` is for passes beside it."""
        started, fit = time.perf_counter(), self.fit
        if fit.solves:
            if fit.matching.engine.repeats_forward:
                run = unwritten(run, inputs)
            self._open = fit.matching.engine.jvp(run, fit.gradient.direction_at(self.number))
        self.seconds += time.perf_counter() - started

    def end(self, scores: Scores) -> None:
        """Keep the scores of the training forward with their derivative."""
        started = time.perf_counter()
        finish, self._open = self._open, None
        jvp = (None,) * len(_tasks(scores)) if finish is None else _tasks(finish.of(scores))
        self.calls.append(Call(_tasks(scores), jvp))
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Give up a forward that failed."""
        if self._open is not None:
            self._open.close()
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
        if target is not None and len(given) > 1:
            check_tasks(given)
        call = self._call_of(given)
        if self.fit.val_probabilities:
            self.fit.report.say_probabilities(given)
        if not self.fit.options.same_kind(options):
            return mean_cross_entropy(logits, target, options)
        if self.fit.evidence is not None and (target is None or len(given) > 1):
            raise MisconfigurationException(contrastive_message())
        tasks = [
            self._solve(scores, jvp, target, options, augmented, group, index)
            for scores, jvp in zip(given, call.jvp, strict=True)
        ]
        losses, self.tasks = zip(*tasks, strict=True)
        failed = [task.solution.failed for task in self.tasks]
        self.failed = failed[0] if len(failed) == 1 else torch.stack(failed).any()
        self.seconds += time.perf_counter() - started
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _solve(
        self,
        scores: Tensor,
        jvp: Tensor | None,
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
        check_target(target, scores, values=fit.looks)
        # Where each process scores its own pairs alone, a column means something else on each.
        ranks = Ranks() if contrastive and scores.shape[0] == scores.shape[1] else fit.ranks
        mask = row_field(self.batch, "augmented", augmented, size)
        self.is_masked = mask is not None
        mask = torch.ones(size, dtype=torch.bool, device=scores.device) if mask is None else mask
        gathered = None
        told = self._told(group, index, None if contrastive else target, mask)
        with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
            wide = widen(scores.detach())
            if fit.evidence is not None:
                gathered = fit.evidence.weigh(
                    self.number, wide, target, mask, told.group, told.index, options, fit.ranks
                )
            if jvp is None:
                solution = gathered or unrefined(wide, target, mask)
            else:
                solution = solve(
                    jvp + (wide - wide),  # no number where scores are none
                    torch.softmax(wide, -1),
                    target,
                    mask,
                    fit.settings,
                    balance_classes=not contrastive,
                    options=options,
                    generator=self.generator,
                    ranks=ranks,
                )
                if gathered is not None:
                    solution = with_evidence(solution, gathered)
            share = weights = solution.weights
            if options.class_weight is not None and target.ndim == 1:
                share = share * options.class_weight[target.long()]  # as F.cross_entropy averages
            total = fit.ranks.sum(share.sum())
        labels = solution.soft_labels if fit.solves else target
        loss = weighted_cross_entropy(scores, labels, weights, **options._asdict(), total=total)
        loss = fit.ranks.size * loss if fit.ranks.size > 1 else loss
        return loss, SolvedTask(solution, gathered, told, target, mask, fit.settings.label_rule)

    def _told(
        self, group: Tensor | None, index: Tensor | None, target: Tensor | None, mask: Tensor
    ) -> StepRows:
        """Return what the data tells of the rows; they have weight 1 so far."""
        is_told = isinstance(self.batch, AugmentedBatch)
        if self.fit.evidence is not None:
            group = row_field(self.batch, "group", group, len(mask))
            if index is not None or is_told:
                index = row_field(self.batch, "index", index, len(mask))
        elif is_told:
            group, index = self.batch.group, self.batch.index
        return StepRows(index, group, target, None, None, mask, mask)

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
            if call.made(logits):
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


def unrefined(scores: Tensor, target: Tensor, augmented: Tensor) -> SAflexSolution:
    """Return the solution that keeps labels, and to which all rows are worth the same."""
    labels = dense_target(target, scores.shape[-1], scores.dtype)
    ones, zeros = torch.ones_like(scores[:, 0]), torch.zeros_like(scores)
    failed = (~scores.isfinite().all(-1) & augmented).any()
    return SAflexSolution(ones, labels, zeros, zeros.sum(), failed)


def with_evidence(solution: SAflexSolution, rows: GatheredRows) -> SAflexSolution:
    """Return a solution whose rows are weighed by evidence too."""
    return replace(
        solution,
        weights=solution.weights * rows.weights,
        inner_products=rows.inner_products,
        inner_product_rms=rows.inner_product_rms,
        failed=solution.failed | rows.failed,
    )


def contrastive_message() -> str:
    """Say what is wrong where evidence meets scores of pairs."""
    return (
        "Expected scores of classes, one tensor, with class labels for `row_evidence`, "
        "but got contrastive scores. Pass preset='gradient', which learns weights and soft labels "
        "of pairs."
    )


def _tasks(scores: Scores) -> tuple[Tensor, ...]:
    return (scores,) if isinstance(scores, Tensor) else as_tuple(scores)
