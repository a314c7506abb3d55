"""Weights for the rows of a fixed pool, from evidence about their labels."""

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .functional import ReduceSum, dense_target
from .row_evidence import RowAverages, discriminant_posteriors
from .watch import FeatureWatch

__all__ = ["PoolRows", "RowEvidenceName"]

RowEvidenceName = Literal["label_probability", "discriminant"]


class PoolRows:
    """Average over its visits how well each augmented row's label fits.

    Args:
        watch: Sees features; read by ``"discriminant"``.
        name: Which number of a row to average: ``"label_probability"``, the model's own probability
            of the given label, or ``"discriminant"``, see `discriminant_posteriors`.
    """

    def __init__(self, watch: FeatureWatch | None, name: RowEvidenceName) -> None:
        self._watch = watch if name == "discriminant" else None
        self._averages = RowAverages()

    def factors(
        self,
        probs: Tensor,
        target: Tensor,
        augmented: Tensor | None,
        index: Tensor | None,
        *,
        reduce_sum: ReduceSum | None,
        rank: int,
        world_size: int,
    ) -> Tensor:
        """Take a scored batch in and return what its rows' weights are multiplied with.

        Args:
            probs: Softmax of the logits, ``(batch, classes)``.
            target: Given labels, ``(batch,)`` int64 or ``(batch, classes)``.
            augmented: Mask of augmented rows, ``(batch,)``; None means all.
            index: Identity of each row, ``(batch,)`` int64; None where nobody tells.
            reduce_sum: Adds a tensor over ranks.
            rank: This process.
            world_size: Number of processes.

        Returns:
            ``(batch,)``, in [0, 1]; means nothing for clean rows.

        Raises:
            MisconfigurationException: If there is no index.
        """
        if index is None:
            raise MisconfigurationException(
                "Expected an `AugmentedBatch`, or `saflex_loss(..., index=)`, for `row_evidence`, "
                "but the training batch does not tell which rows it holds. Give every row of the "
                "pool a number that is the same in every epoch."
            )
        if self._watch is not None:
            val_features, _, val_labels, present = self._watch.bank.read()
            probs = discriminant_posteriors(self._watch.features, val_features, val_labels, present)
        values = (dense_target(target, probs.shape[-1], probs.dtype) * probs).sum(-1)
        averages = self._averages.update(
            index if augmented is None else torch.where(augmented, index, -1),
            values,
            reduce_sum=reduce_sum,
            rank=rank,
            world_size=world_size,
        )
        return torch.where(averages.isfinite(), averages, 1)

    def read(self) -> Tensor:
        """Return the average of every index.

        Returns:
            ``(largest index + 1,)`` float64; NaN for rows that were never seen as augmented ones.
        """
        return self._averages.read()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return self._averages.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        self._averages.load_state_dict(state)
