"""One training step: what the callback hands to the module, and what the loss does with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .batch import AugmentedBatch
from .engines import Engine, RowSubset, Scores, Tangent, is_out_of_memory
from .evidence import rescale_weights
from .functional import (
    Preset,
    ReduceSum,
    SAflexSolution,
    check_target,
    contrastive_target,
    soft_cross_entropy,
    solution_metrics,
    solve,
    weighted_mean,
)
from .gathered import Gathered

__all__ = [
    "HasScores",
    "LossOptions",
    "SAflexStep",
    "as_tuple",
    "call_scores",
    "check_skippable",
    "mean_cross_entropy",
    "read_batch",
]

_INPUT_NAMES = ("inputs", "x", "image")
_TARGET_NAMES = ("target", "y", "label")


class HasScores(Protocol):
    """A module with the one function from inputs to logits."""

    def saflex_scores(self, *inputs: Any, **kwargs: Any) -> Scores:
        """Return the logits of some inputs."""
        ...


class LossOptions(NamedTuple):
    """Options of the training loss that the validation gradient shares.

    Attributes:
        class_weight: ``(classes,)`` or None.
        label_smoothing: In [0, 1).
    """

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def same_kind(self, other: "LossOptions") -> bool:
        """Say whether both weigh classes or not, and smooth alike.

        Args:
            other: Options to compare with.

        Returns:
            True if a gradient made with one serves the other.
        """
        return (self.class_weight is None) == (other.class_weight is None) and (
            self.label_smoothing == other.label_smoothing
        )

    def to(self, device: torch.device) -> "LossOptions":
        """Return the options with the class weights on a device.

        Args:
            device: Where the parameters live.

        Returns:
            Options.
        """
        weight = None if self.class_weight is None else self.class_weight.to(device)
        return self._replace(class_weight=weight)


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
    scores_tangent: Scores | None = None
    probed_rows: Tensor | None = None
    options_seen: LossOptions | None = None
    solutions: tuple[SAflexSolution, ...] = ()
    metrics: dict[str, Tensor] = field(default_factory=dict)
    batch_size: int = 0

    @property
    def finite(self) -> Tensor:
        """Whether every task was solved without meeting a non-finite number, scalar bool."""
        return torch.stack([solution.finite for solution in self.solutions]).all()

    def measure(self, forward: Callable[[], Scores], probe: Callable[[], Scores]) -> Scores:
        """Run the training forward once, and keep the tangent of its scores.

        Where memory runs out before the forward, the step is left unrefined.

        Args:
            forward: The training forward.
            probe: What the engine's extra pass runs.

        Returns:
            The scores with their graph.

        Raises:
            RuntimeError: If memory runs out on one of several processes.
        """
        is_forward = False

        def training_forward() -> Scores:
            nonlocal is_forward
            is_forward = True
            return forward()

        try:
            scores, self.scores_tangent = self.engine.measure(
                training_forward, self.tangent, probe=probe, rows=self.probed_rows
            )
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
        losses, self.solutions, metrics = zip(*tasks, strict=True)
        self.metrics = {
            name: torch.stack([task[name].float() for task in metrics]).mean()
            for name in metrics[0]
        }
        return torch.stack(losses).mean()

    def _augmented_rows(self, batch_size: int, augmented: Tensor | None = None) -> Tensor | None:
        """Return the mask of augmented rows, or None when all are.

        Args:
            batch_size: Rows that were scored.
            augmented: The caller's own mask; not beside an `AugmentedBatch`, which has one.

        Returns:
            ``(batch,)`` bool or None.

        Raises:
            ValueError: If the mask has another length or dtype, or there are two of them.
        """
        if isinstance(self.batch, AugmentedBatch):
            if augmented is not None:
                raise ValueError(
                    "Expected `augmented` to be None beside an `AugmentedBatch`, but got a second "
                    "mask. The extra pass has measured the batch's own augmented rows; change "
                    "the mask in the batch."
                )
            augmented = self.batch.augmented
        if augmented is not None and (
            augmented.shape != (batch_size,) or augmented.dtype != torch.bool
        ):
            raise ValueError(
                f"Expected `augmented` to be a bool tensor of shape ({batch_size},), but got "
                f"{augmented.dtype} of shape {tuple(augmented.shape)}. Pass one entry per row of "
                "the logits."
            )
        return augmented

    def _row_field(self, name: str, given: Tensor | None, batch_size: int) -> Tensor | None:
        """Return the group or index of every row, or None where nobody tells.

        Args:
            name: Field of `AugmentedBatch`.
            given: The caller's own; not beside an `AugmentedBatch`, which has one.
            batch_size: Rows that were scored.

        Returns:
            ``(batch,)`` int64 or None.

        Raises:
            ValueError: If there are two of them, or it has another length or dtype.
        """
        if isinstance(self.batch, AugmentedBatch):
            if given is not None:
                raise ValueError(
                    f"Expected `{name}` to be None beside an `AugmentedBatch`, but got a second "
                    "one. Change it in the batch."
                )
            given = getattr(self.batch, name)
        if given is not None and (given.shape != (batch_size,) or given.dtype != torch.int64):
            raise ValueError(
                f"Expected `{name}` to be an int64 tensor of shape ({batch_size},), but got "
                f"{given.dtype} of shape {tuple(given.shape)}. Pass one entry per row of the "
                "logits."
            )
        return given

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
            self._row_field("index", index, len(probs)),
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
    ) -> tuple[Tensor, SAflexSolution, dict[str, Tensor]]:
        """Solve one task and return its loss, its solution and what the solution did."""
        contrastive = target is None
        target = _diagonal_target(scores) if target is None else target
        # Where each process scores its own pairs alone, a column means something else on each.
        own_pairs = contrastive and scores.shape[0] == scores.shape[1]
        reduce_sum = None if own_pairs else self.reduce_sum
        check_target(target, scores, values=target.device.type == "cpu")
        mask = self._augmented_rows(scores.shape[0], augmented)
        gated = None
        if self.gathered.gates is not None:
            group = self._row_field("group", group, scores.shape[0])
            gated = self.gathered.gates.take(mask, group, scores.shape[0])
            mask = gated.augmented
        with torch.no_grad():
            probs = torch.softmax(
                scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)
            )
            solution = solve(
                tangent.masked_fill(~self.usable, torch.nan),  # the solve then skips itself
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
            total = share.sum()
            if self.reduce_sum is not None:
                total = self.reduce_sum(total)
            metrics = solution_metrics(solution, target, mask)
            if gated is not None:
                metrics["kept_fraction"] = metrics["kept_fraction"] * gated.left_fraction
        losses = soft_cross_entropy(
            scores,
            solution.soft_labels,
            class_weight=options.class_weight,
            label_smoothing=options.label_smoothing,
        )
        loss = self.world_size * weighted_mean(losses, solution.weights, total)
        return loss, solution, metrics

    def _row_tangents(self, logits: Scores) -> tuple[Tensor, ...]:
        """Return the tangent of every row of every task, after checking that it fits the logits."""
        if self.scores_tangent is None:
            raise MisconfigurationException(
                "Expected `self.saflex_forward(...)` to run before `self.saflex_loss(...)` in "
                "`training_step`, but it did not. Compute the logits with `saflex_forward`."
            )
        scores, tangents = as_tuple(logits), as_tuple(self.scores_tangent)
        if self.probed_rows is not None and len(scores) == len(tangents):
            tangents = tuple(
                tangent.new_zeros(task.shape).index_copy(0, self.probed_rows, tangent)
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


def check_skippable(error: Exception, world_size: int) -> None:
    """Return where the solve may be skipped because of an error; raise otherwise.

    Args:
        error: What a pass of the solve has raised.
        world_size: Number of processes.

    Raises:
        RuntimeError: If memory ran out on one of several processes.
    """
    if not is_out_of_memory(error):
        raise error
    if world_size > 1:
        raise RuntimeError(
            "Expected memory for the solve on every process, but this one ran out of it, and the "
            "others wait for it in the solve, so that it cannot be skipped. Lower "
            "`val_batch_size` or the training batch, or pass engine='head'."
        ) from error


def mean_cross_entropy(logits: Scores, target: Tensor | None, options: LossOptions) -> Tensor:
    """Return ``F.cross_entropy``, averaged over tasks when the scores are a tuple.

    Args:
        logits: ``(batch, classes)``, or a tuple of them.
        target: As for `SAflexMixin.saflex_loss`.
        options: Class weights and label smoothing.

    Returns:
        Scalar.
    """
    weight = options.class_weight
    losses = [
        torch.nn.functional.cross_entropy(
            scores,
            _diagonal_target(scores) if target is None else target,
            weight=None if weight is None else weight.to(scores.dtype),
            label_smoothing=options.label_smoothing,
        )
        for scores in as_tuple(logits)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _diagonal_target(scores: Tensor) -> Tensor:
    """Return which column belongs to each row, also where columns are the pairs of all ranks."""
    if scores.ndim == 2 and scores.shape[0] == scores.shape[1]:
        return contrastive_target(scores)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return contrastive_target(scores)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return contrastive_target(scores, rank=rank, world_size=world_size)


def call_scores(module: HasScores, inputs: Any) -> Scores:
    """Return the scores of a validation batch's inputs.

    Args:
        module: The module.
        inputs: A tuple is splatted, a dict passed as keywords, anything else is the one argument.

    Returns:
        What `SAflexMixin.saflex_scores` returns.
    """
    if isinstance(inputs, dict):
        return module.saflex_scores(**inputs)
    if isinstance(inputs, tuple):
        return module.saflex_scores(*inputs)
    return module.saflex_scores(inputs)


def read_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the inputs and target fields of a batch.

    Args:
        batch: A tuple, list, dict, named tuple or dataclass; see `SAflexMixin.saflex_val_batch`.

    Returns:
        Inputs and target.

    Raises:
        TypeError: If the batch has no such fields.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    fields = batch if isinstance(batch, dict) else getattr(batch, "__dict__", {})
    inputs = [name for name in _INPUT_NAMES if name in fields]
    targets = [name for name in _TARGET_NAMES if name in fields]
    if not inputs or not targets:
        raise TypeError(
            "Expected a validation batch to be a tuple or list of (inputs, target), or a dict or "
            f"dataclass with one of {_INPUT_NAMES} and one of {_TARGET_NAMES}, but got "
            f"{type(batch).__name__} with fields {sorted(fields)}. Override "
            "`saflex_val_batch(batch)` to return (inputs, target)."
        )
    return fields[inputs[0]], fields[targets[0]]


def as_tuple(scores: Scores) -> tuple[Tensor, ...]:
    """Return scores as a tuple of tasks.

    Args:
        scores: A tensor, or a tuple of them.

    Returns:
        A tuple.
    """
    return (scores,) if isinstance(scores, Tensor) else tuple(scores)
