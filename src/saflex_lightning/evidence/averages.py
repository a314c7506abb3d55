"""A number of each row of a data set, averaged over the steps that showed it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saflex_lightning.functional.ranks import Ranks

__all__ = ["RowAverages", "RowEvidence"]

_DECAY = 0.7  # of earlier visits of a row, per visit


class RowEvidence(NamedTuple):
    """How well the labels of rows fit.

    Attributes:
        index: Identity of each row that was seen as an augmented one, ``(rows,)`` int64, sorted.
        evidence: Posterior of its label, averaged over its visits with the newest ones counting
            most, ``(rows,)`` float64 in [0, 1]; low where the label looks wrong.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    evidence: Tensor


class RowAverages:
    """Average a number of each row over its visits; rows are known by their index.

    Only indices that occur are held, whatever their size, on the CPU and the same on all ranks.
    """

    def __init__(self) -> None:
        self._index = torch.zeros(0, dtype=torch.int64)  # sorted
        self._sums = torch.zeros(2, 0, dtype=torch.float64)  # of the numbers, and of visits

    def update(self, index: Tensor, values: Tensor, counted: Tensor, ranks: Ranks) -> Tensor:
        """Take in the numbers of one step, of this rank and of the others.

        Returns the averages of this rank's rows, ``(rows,)`` like ``values``; the value itself for
        a row that was never ``counted``. What is not finite is left out.
        """
        counted = counted & values.isfinite()
        rows = torch.stack([torch.where(counted, values, 0), counted], 1).to(torch.float64)
        room = ranks.most_rows(rows)
        rows = ranks.gather(rows, room).cpu()
        counts = rows[:, 1] > 0
        places = self._places_of(ranks.gather(index, room).cpu()[counts])
        visits = torch.zeros_like(self._sums).index_add_(1, places, rows[counts].T)
        self._sums = torch.where(visits[1] > 0, _DECAY * self._sums + visits, self._sums)
        if not len(self._index):
            return values
        own = torch.searchsorted(self._index, index.cpu()).clamp(max=len(self._index) - 1)
        known = (self._index[own] == index.cpu()).to(values.device)
        sums, visits = self._sums[:, own]
        return torch.where(known, (sums / visits).to(values), values)

    def read(self) -> RowEvidence:
        """Return the average of every index."""
        sums, visits = self._sums
        return RowEvidence(self._index, sums / visits)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"index": self._index, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._index, self._sums = state["index"], state["sums"]

    def _places_of(self, wanted: Tensor) -> Tensor:
        """Return where indices are held, having made room for new ones."""
        known = torch.isin(wanted, self._index)
        if not bool(known.all()):
            merged = torch.cat([self._index, wanted[~known]]).unique()
            sums = self._sums.new_zeros(2, len(merged))
            sums[:, torch.searchsorted(merged, self._index)] = self._sums
            self._index, self._sums = merged, sums
        return torch.searchsorted(self._index, wanted)
