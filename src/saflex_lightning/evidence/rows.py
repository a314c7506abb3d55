r"""Which augmented rows are believed: is the given label right?

Rows of a fixed pool come back every epoch, so a number of each row can be averaged over its visits.
That number is the posterior of the given label in a Gaussian discriminant whose class means m and
shared covariance S come from validation features,

.. math:: q_{ik} \propto \pi_k \exp\big(-\tfrac12 (h_i - m_k)^\top S^{-1} (h_i - m_k)\big).

The gradient inner product of the given label, averaged alike, tells right from wrong less well, and
the less the more the pool is memorised.
"""

from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from saflex_lightning.functional.ranks import Ranks

from .memory import ValidationMemory
from .products import damped_factor

__all__ = ["RowAverages", "RowEvidence", "RowWeights", "discriminant_posteriors"]

_PRIOR = 1.0  # rows of average features that every class has beside its own


class RowEvidence(NamedTuple):
    """How well the labels of rows fit.

    Attributes:
        index: Identity of each row that was seen as an augmented one, ``(rows,)`` int64, sorted.
        evidence: Posterior of its label, averaged over its visits, ``(rows,)`` float64 in [0, 1];
            low where the label looks wrong.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    evidence: Tensor


class RowAverages:
    """Average a number of each row over the steps that showed it; rows are known by their index.

    Only indices that occur are held, whatever their size, on the CPU and the same on all ranks.
    """

    def __init__(self) -> None:
        self._index = torch.zeros(0, dtype=torch.int64)  # sorted
        self._sums = torch.zeros(2, 0, dtype=torch.float64)  # of the numbers, and how many

    def update(self, index: Tensor, values: Tensor, counted: Tensor, ranks: Ranks) -> Tensor:
        """Take in the numbers of one step, of this rank and of the others.

        Returns the averages of this rank's rows, ``(rows,)`` like ``values``; the value itself for
        a row that was never ``counted``. What is not finite is left out.
        """
        counted = counted & values.isfinite()
        rows = torch.stack([torch.where(counted, values, 0), counted], 1).to(torch.float64)
        room = ranks.most_rows(rows)
        rows = ranks.gather(rows, room).cpu()
        places = self._places_of(ranks.gather(index, room).cpu(), rows[:, 1] > 0)
        self._sums.index_add_(1, places, rows[rows[:, 1] > 0].T)
        own = torch.searchsorted(self._index, index.cpu()).clamp(max=max(len(self._index) - 1, 0))
        if not len(self._index):
            return values
        known = (self._index[own] == index.cpu()).to(values.device)
        sums, counts = self._sums[:, own]
        return torch.where(known, (sums / counts).to(values), values)

    def read(self) -> RowEvidence:
        """Return the average of every index."""
        sums, counts = self._sums
        return RowEvidence(self._index, sums / counts)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"index": self._index, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._index, self._sums = state["index"], state["sums"].clone()

    def _places_of(self, index: Tensor, counted: Tensor) -> Tensor:
        """Return where the counted indices are held, having made room for new ones."""
        wanted = index[counted]
        known = torch.isin(wanted, self._index)
        if not bool(known.all()):
            merged = torch.cat([self._index, wanted[~known]]).unique()
            sums = self._sums.new_zeros(2, len(merged))
            sums[:, torch.searchsorted(merged, self._index)] = self._sums
            self._index, self._sums = merged, sums
        return torch.searchsorted(self._index, wanted)


class RowWeights:
    """Weigh augmented rows by the posterior of their label, averaged over their visits."""

    def __init__(self, memory: ValidationMemory) -> None:
        self._memory = memory
        self.averages = RowAverages()

    def factors(
        self,
        features: Tensor,
        labels: Tensor,
        augmented: Tensor,
        index: Tensor | None,
        ranks: Ranks,
    ) -> Tensor:
        """Take a scored batch in and return what its rows' weights are multiplied with, in [0, 1].

        Raises:
            MisconfigurationException: If there is no index.
        """
        if index is None:
            raise MisconfigurationException(
                "Expected an `AugmentedBatch`, or `saflex_loss(..., index=)`, for `row_evidence`, "
                "but the training batch does not tell which rows it holds. Give every row of the "
                "pool a number that is the same in every epoch."
            )
        val_features, _, val_labels, present = self._memory.read()
        posteriors = discriminant_posteriors(features, val_features, val_labels, present)
        values = (labels * posteriors).sum(-1)
        averages = self.averages.update(index, values, augmented, ranks)
        return torch.where(averages.isfinite(), averages, 1)


def discriminant_posteriors(
    features: Tensor, val_features: Tensor, val_labels: Tensor, present: Tensor
) -> Tensor:
    """Return class posteriors of rows by the formula at the top of this file.

    ``present`` is 1 for validation rows that count, else 0. A class mean is drawn to the mean of
    all rows as if one more row lay there, so that a class without validation rows has a small
    posterior instead of none.
    """
    size = present.sum().clamp(min=1)
    center = val_features.sum(0) / size
    centred = (val_features - center) * present.unsqueeze(1)
    counts = val_labels.sum(0) + _PRIOR
    means = (val_labels.T @ centred) / counts.unsqueeze(1)
    within = centred - val_labels @ means
    directions = torch.cholesky_solve(means.T, damped_factor(within.T @ within / size))
    offsets = counts.log() - 0.5 * (means * directions.T).sum(1)
    return torch.softmax((features - center) @ directions + offsets, -1)
