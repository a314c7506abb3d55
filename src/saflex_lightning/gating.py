"""The gates in a fit: what they watch, which rows they replace, and what they tell the loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .bank import RunningMoments
from .batch import AugmentedBatch
from .evidence import (
    draw_rejected,
    group_evidence,
    last_layer_products,
    next_log_weights,
    rescale_weights,
)
from .functional import ReduceSum, dense_target, loss_inner_products
from .gated_rows import WITHOUT_GATES, check_gated_rows, swap_rows
from .watch import FeatureWatch

__all__ = ["Gates"]

_WARM_UP = 0.1  # share of training during which the gates watch and do not move


class GatedRows(NamedTuple):
    """What the gates leave of a training batch.

    Attributes:
        augmented: True for augmented rows that are left, ``(batch,)``.
        group: ``(batch,)`` int64, 0 for clean and for dropped rows.
        dropped: True for rejected rows whose batch does not tell their source, ``(batch,)``.
        left_fraction: Share of the augmented rows that are left, scalar; 1 where there were none.
    """

    augmented: Tensor
    group: Tensor
    dropped: Tensor
    left_fraction: Tensor


class ScoredRows(NamedTuple):
    """Training rows whose loss was computed, and the options of that loss."""

    probs: Tensor
    target: Tensor
    group: Tensor
    dropped: Tensor
    class_weight: Tensor | None
    label_smoothing: float


class Gates:
    """Gather evidence by group, and let fewer rows of harmful groups through.

    They start to move after a tenth of the training.

    Args:
        watch: Sees one validation batch and the training batch of every refined step.
    """

    def __init__(self, watch: FeatureWatch) -> None:
        self._watch = watch
        self.names: tuple[str, ...] = ()
        self.log_weights = torch.zeros(0)
        self._moments = RunningMoments()
        self._generator = torch.Generator()
        self._is_checked = False
        self._scored: ScoredRows | None = None
        self._swapped: Tensor | None = None  # rows of this batch; None where it tells no sources

    # Once per fit

    def start(self, *, names: Sequence[str], num_batches: float, device: torch.device) -> None:
        """Take the groups of a fit.

        Args:
            names: Name of every group; the first is that of clean rows.
            num_batches: Training batches of the whole training.
            device: Where the parameters live.

        Raises:
            MisconfigurationException: If a checkpoint's gates belong to other groups.
        """
        if self.names and self.names != tuple(names):
            raise MisconfigurationException(
                f"Expected the gates of the checkpoint to be those of {list(names)}, but they "
                f"belong to {list(self.names)}. Resume with the augmentation of that run, or pass "
                "`gates=False`."
            )
        self._first_move = _WARM_UP * num_batches
        if not self.names:
            self.names = tuple(names)
            self.log_weights = torch.zeros(len(names))
        self.log_weights = self.log_weights.to(device)
        self._moments.to(device)

    # Every training step, in this order

    def begin(self, batch: Any, generator: torch.Generator) -> None:
        """Replace the rejected rows of a training batch by their clean sources, in place.

        Args:
            batch: The training batch, on the device. One that is not an `AugmentedBatch` is left
                alone: its rejected rows are dropped by `take` instead.
            generator: Source of this step's draws, of its own on every rank.
        """
        self._generator = generator
        self._scored = self._swapped = None
        if isinstance(batch, AugmentedBatch):
            fields: tuple[Any, ...] = (batch.group, batch.source)
            if any(field is None for field in fields):
                raise MisconfigurationException(
                    "Expected `AugmentedBatch` to tell `group` and `source` of its rows for "
                    f"`gates=True`, but one of them is None. {WITHOUT_GATES}"
                )
            self._check_once(batch.augmented, batch.group, batch)
            rejected = draw_rejected(self.log_weights, batch.group, generator)
            rejected &= batch.augmented & (batch.source >= 0)
            swap_rows(batch, rejected)
            self._swapped = rejected.sum()

    def take(self, augmented: Tensor | None, group: Tensor | None, size: int) -> GatedRows:
        """Return what the gates leave of a batch whose loss is asked for.

        Args:
            augmented: Mask of augmented rows, ``(batch,)``; None means all.
            group: ``(batch,)`` int64; None where the caller gave none.
            size: Rows of the batch.

        Returns:
            The rows left.

        Raises:
            MisconfigurationException: If nobody tells the groups.
        """
        if group is None:
            raise MisconfigurationException(
                "Expected an `AugmentedBatch`, or `saflex_loss(..., augmented=, group=)`, for "
                "`gates=True`, but the training batch does not tell which group made its rows. "
                f"Yield an `AugmentedBatch` with `group` and `source`. {WITHOUT_GATES}"
            )
        if augmented is None:
            augmented = torch.ones(size, dtype=torch.bool, device=group.device)
        if self._swapped is None:
            self._check_once(augmented, group)
            dropped = draw_rejected(self.log_weights, group, self._generator) & augmented
            removed = dropped.sum()
        else:
            dropped, removed = torch.zeros_like(augmented), self._swapped
        left = augmented & ~dropped
        fraction = torch.where(removed > 0, left.sum() / (left.sum() + removed).clamp(min=1), 1)
        return GatedRows(left, torch.where(left, group, 0), dropped, fraction)

    def reweigh(
        self, weights: Tensor, gated: GatedRows, reduce_sum: ReduceSum | None = None
    ) -> Tensor:
        """Return sample weights with helpful groups raised and dropped rows at 0.

        Args:
            weights: Of the solve, ``(batch,)``.
            gated: From `take`.
            reduce_sum: Adds a tensor over ranks.

        Returns:
            ``(batch,)``.
        """
        factors = self.log_weights.exp().clamp(min=1)[gated.group]
        weights = rescale_weights(weights, factors, gated.augmented, reduce_sum)
        return weights.masked_fill(gated.dropped, 0)

    def note(
        self,
        probs: Tensor,
        target: Tensor,
        gated: GatedRows,
        class_weight: Tensor | None,
        label_smoothing: float,
    ) -> None:
        """Keep the scored training rows for `end`.

        Args:
            probs: Softmax of the logits, ``(batch, classes)``.
            target: Given labels, ``(batch,)`` int64 or ``(batch, classes)``.
            gated: From `take`.
            class_weight: Of the training loss, ``(classes,)``.
            label_smoothing: Of the training loss.
        """
        self._scored = ScoredRows(
            probs, target, gated.group, gated.dropped, class_weight, label_smoothing
        )

    def end(self, number: int, reduce_sum: ReduceSum | None) -> None:
        """Take the training batch's evidence in, and move the gates once the warm-up is over.

        Args:
            number: Number of the training batch.
            reduce_sum: Adds a tensor over ranks.
        """
        if self._scored is None:
            return
        rows, self._scored = self._scored, None
        labels = dense_target(rows.target, rows.probs.shape[-1], rows.probs.dtype)
        features, probs = self._watch.features, rows.probs
        usable = features.isfinite().all(1) & probs.isfinite().all(1) & ~rows.dropped
        features = torch.where(usable.unsqueeze(1), features, 0)
        probs = torch.where(usable.unsqueeze(1), probs, 0)
        counted = usable.to(features.dtype)
        mean, covariance = self._moments.update(features, counted, reduce_sum)
        val_features, val_residuals, _, present = self._watch.bank.read()
        products = last_layer_products(
            features, probs, mean, covariance, val_features, val_residuals, present
        )
        products = loss_inner_products(products, rows.class_weight, rows.label_smoothing)
        means, counts = group_evidence(
            products,
            labels,
            rows.group,
            len(self.names) - 1,
            usable=counted,
            reduce_sum=reduce_sum,
        )
        if number >= self._first_move:
            self.log_weights = next_log_weights(self.log_weights, means, counts)

    def metrics(self) -> dict[str, Tensor]:
        """Return each group's w by its name.

        Returns:
            Scalars, on the device.
        """
        weights = self.log_weights.exp()
        return {f"gate/{name}": weights[number] for number, name in enumerate(self.names) if number}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return {
            "names": self.names,
            "log_weights": self.log_weights,
            "moments": self._moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        self.names, self.log_weights = tuple(state["names"]), state["log_weights"]
        self._moments.load_state_dict(state["moments"])

    def _check_once(
        self, augmented: Tensor, group: Tensor, batch: AugmentedBatch | None = None
    ) -> None:
        if not self._is_checked and bool(augmented.any()):
            self._is_checked = True
            check_gated_rows(augmented, group, len(self.names) - 1, batch)
