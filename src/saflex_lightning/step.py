"""One training step: what the callback hands to the module, and what the loss does with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .batch import row_field
from .engines import Engine, RowSubset, Scores, Tangent, as_tuple
from .evidence import rescale_weights
from .functional import (
    Preset,
    ReduceSum,
    SAflexSolution,
    check_target,
    soft_cross_entropy,
    solve,
    sum_over_ranks,
    weighted_mean,
    widen,
)
from .gathered import Gathered
from .learned import Learned
from .measured import MeasuredScores, find_call
from .plain_loss import LossOptions, diagonal_target, mean_cross_entropy
from .skips import check_skippable

__all__ = ["SAflexStep"]


@dataclass
class SAflexStep:
    """What the callback hands to the module for one training step, and what comes back.

    The first block is set by the callback when it arms the module; the second is filled by
    `SAflexMixin.saflex_forward` and `SAflexMixin.saflex_loss`.
    """

    preset: Preset
    engine: Engine
    tangent: Tangent
    usable: Tensor
    rows: RowSubset
    options: LossOptions
    num_classes: int
    batch: Any
    generator: torch.Generator
    gathered: Gathered = field(default_factory=Gathered)
    rank: int = 0
    world_size: int = 1
    reduce_sum: ReduceSum | None = None
    seconds: float = 0.0

    out_of_memory: bool = False
    measured: list[MeasuredScores] = field(default_factory=list)
    options_seen: LossOptions | None = None
    learned: tuple[Learned, ...] = ()
    batch_size: int = 0

    @property
    def solutions(self) -> tuple[SAflexSolution, ...]:
        """The solution of each task; empty before the loss."""
        return tuple(task.solution for task in self.learned)

    @property
    def finite(self) -> Tensor:
        """Whether every task was solved without meeting a non-finite number, scalar bool."""
        return torch.stack([solution.finite for solution in self.solutions]).all()

    def measure(
        self, forward: Callable[[], Scores], probe: Callable[[], Scores], rows: Tensor | None
    ) -> Scores:
        """Run the training forward once, and keep its scores with their tangent.

        Where memory runs out before the forward, the step is left unrefined.

        Args:
            forward: The training forward.
            probe: What the engine's extra pass runs.
            rows: Rows of the batch that it computes, int64; None means all.

        Returns:
            The scores with their graph.

        Raises:
            MisconfigurationException: If features are watched and the scores of the call before
                are still waiting for their loss: only those of the last call are kept.
            RuntimeError: If memory runs out on one of several processes.
        """
        watch = self.gathered.watch
        if watch is not None and not all(call.is_used for call in self.measured):
            raise MisconfigurationException(
                f"Expected `saflex_loss` to follow each `saflex_forward` with {watch.wanted_by}, "
                "but two forwards came before a loss. Compute the loss of the first scores before "
                "the second forward, and scores that need none with `self(...)`."
            )
        is_forward = False

        def training_forward() -> Scores:
            nonlocal is_forward
            is_forward = True
            return forward()

        try:
            scores, tangent = self.engine.measure(
                training_forward, self.tangent, probe=probe, rows=rows
            )
            self.measured.append(MeasuredScores(scores, tangent, rows))
            return scores
        except (RuntimeError, MemoryError) as error:
            if is_forward:
                raise
            check_skippable(error, self.world_size)
        self.out_of_memory = True
        return forward()  # past the handler, whose error holds what the failed pass held

    def refine(
        self,
        logits: Scores,
        target: Tensor | None,
        options: LossOptions,
        augmented: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Solve every task, keep what was learned, and return the mean of their losses.

        Args:
            logits: What the forward returned.
            target: As for `SAflexMixin.saflex_loss`.
            options: Options of the loss.
            augmented: Mask given by the caller.
            group: Groups given by the caller.
            index: Identities given by the caller.

        Returns:
            Scalar; plain cross-entropy where the validation gradient was made with other options.
        """
        self.options_seen = options
        tangents = self._row_tangents(logits)
        self.batch_size = tangents[0].shape[0]
        if not self.options.same_kind(options):
            return mean_cross_entropy(logits, target, options)
        tasks = [
            self._refine_task(scores, tangent, target, options, augmented, group, index)
            for scores, tangent in zip(as_tuple(logits), tangents, strict=True)
        ]
        losses, self.learned = zip(*tasks, strict=True)
        return torch.stack(losses).mean()

    def _weigh_rows(
        self,
        weights: Tensor,
        probs: Tensor,
        target: Tensor,
        mask: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        """Multiply weights by the evidence about each row of a pool, where that is asked for."""
        if self.gathered.pool is None:
            return weights
        factors = self.gathered.pool.factors(
            probs,
            target,
            mask,
            row_field(self.batch, "index", index, len(probs)),
            reduce_sum=self.reduce_sum,
            rank=self.rank,
            world_size=self.world_size,
        )
        mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
        return rescale_weights(weights, factors, mask, self.reduce_sum)

    def _refine_task(
        self,
        scores: Tensor,
        tangent: Tensor,
        target: Tensor | None,
        options: LossOptions,
        augmented: Tensor | None,
        group: Tensor | None,
        index: Tensor | None,
    ) -> tuple[Tensor, Learned]:
        """Solve one task and return its loss and what was learned."""
        contrastive = target is None
        target = diagonal_target(scores) if target is None else target
        # Where each process scores its own pairs alone, a column means something else on each.
        own_pairs = contrastive and scores.shape[0] == scores.shape[1]
        reduce_sum = None if own_pairs else self.reduce_sum
        check_target(target, scores, values=target.device.type == "cpu")
        mask = row_field(self.batch, "augmented", augmented, scores.shape[0])
        gated = None
        if self.gathered.gates is not None:
            group = row_field(self.batch, "group", group, scores.shape[0])
            gated = self.gathered.gates.take(mask, group, scores.shape[0])
            mask = gated.augmented
        with torch.no_grad():
            probs = torch.softmax(widen(scores), -1)
            finite = scores.isfinite().all(-1)
            usable = self.usable & (finite if mask is None else finite | ~mask).all()
            solution = solve(
                tangent.masked_fill(~usable, torch.nan),  # the solve then skips itself
                probs,
                target,
                mask,
                score_space=self.preset.score_space,
                normalize=self.preset.normalize,
                label_rule=self.preset.label_rule,
                label_penalty=self.preset.label_penalty,
                temperature=self.preset.temperature,
                gumbel=self.preset.gumbel,
                weight_rule=self.preset.weight_rule,
                balance_classes=not contrastive,
                class_weight=options.class_weight,
                label_smoothing=options.label_smoothing,
                generator=self.generator,
                reduce_sum=reduce_sum,
            )
            weights = self._weigh_rows(solution.weights, probs, target, mask, index)
            if self.gathered.gates is not None and gated is not None:
                weights = self.gathered.gates.reweigh(weights, gated, self.reduce_sum)
                self.gathered.gates.note(probs, target, gated, *options)
            solution = replace(solution, weights=weights)
            share = solution.weights
            if options.class_weight is not None and target.ndim == 1:
                share = share * options.class_weight[target]  # as F.cross_entropy averages
            total = sum_over_ranks(share.sum(), self.reduce_sum)
        losses = soft_cross_entropy(
            scores,
            solution.soft_labels,
            class_weight=options.class_weight,
            label_smoothing=options.label_smoothing,
        )
        loss = self.world_size * weighted_mean(losses, solution.weights, total)
        return loss, Learned(solution, target, mask, gated and gated.left_fraction)

    def _row_tangents(self, logits: Scores) -> tuple[Tensor, ...]:
        """Return the tangent of every row of every task, after checking that it fits the logits."""
        if not self.measured:
            raise MisconfigurationException(
                "Expected `self.saflex_forward(...)` to run before `self.saflex_loss(...)` in "
                "`training_step`, but it did not. Compute the logits with `saflex_forward`."
            )
        measured = find_call(self.measured, logits)
        measured.is_used = True
        scores, tangents = as_tuple(logits), as_tuple(measured.tangent)
        if measured.rows is not None and len(scores) == len(tangents):
            tangents = tuple(
                tangent.new_zeros(task.shape).index_copy(0, measured.rows, tangent)
                for task, tangent in zip(scores, tangents, strict=True)
            )
        found, expected = [tuple(s.shape) for s in scores], [tuple(t.shape) for t in tangents]
        if found != expected:
            raise ValueError(
                f"Expected `logits` of shape {expected}, as from `saflex_forward`, but got "
                f"{found}. Pass them on unchanged."
            )
        one = isinstance(logits, Tensor)  # the classes of proxy tasks are the batch's own
        if one and self.num_classes and logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"Expected the training batch to be scored over {self.num_classes} classes like "
                f"the validation batch, but got {logits.shape[-1]}. Use one head for both."
            )
        return tangents
