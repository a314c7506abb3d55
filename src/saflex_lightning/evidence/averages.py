"""A number of each row of a data set, averaged over the steps that showed it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saflex_lightning.functional.losses import looking_is_free
from saflex_lightning.functional.ranks import Ranks

__all__ = ["RowAverages", "RowEvidence"]


class RowEvidence(NamedTuple):
    """How well the labels of rows fit.

    Attributes:
        index: Identity of each row that was seen as an augmented one, ``(rows,)`` int64, sorted.
        evidence: Posterior of its label, averaged over its visits, ``(rows,)`` float64 in [0, 1];
            low where the label looks wrong. A visit counts by how much the discriminant told then.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    evidence: Tensor


class RowAverages:
    """Average a number of each row over its visits, each of some worth; its index tells a row.

    Only indices that occur are held, whatever their size, where the rows are and the same on all
    ranks. What steps tell waits until it is taken in, so that a step finds its rows without waiting
    for the device; on one, a row that comes again before that has its earlier visits alone.
    """

    def __init__(self) -> None:
        self._index = torch.zeros(0, dtype=torch.int64)  # sorted
        self._sums = torch.zeros(2, 0)  # of worth times numbers, and of worth
        self._waiting: list[tuple[Tensor, Tensor]] = []  # index and what is new, of each step
        self._worth = 1.0  # of the visits that wait
        self._those: set[int] = set()  # indices that wait, where looking at them is free

    def update(
        self, index: Tensor, values: Tensor, ignored: Tensor, ranks: Ranks, worth: float
    ) -> Tensor:
        """Let the numbers of one step wait, and return the averages of its rows with them.

        These are ``(rows,)`` like ``values``. What is ``ignored`` counts in this step alone. The
        ``worth`` of its visits is above 0.
        """
        if not self._sums.shape[1]:
            self._index, self._sums = self._index.to(index.device), self._sums.to(values)
        if worth != self._worth:
            self.take_in()
            self._worth = worth
        sums = torch.stack([values, torch.ones_like(values)])
        new = sums.masked_fill(ignored, 0)
        rows = index, new
        if ranks.size > 1:
            room = ranks.most_rows(values)
            rows = ranks.gather(index, room), ranks.gather(new.T, room).T
        if looking_is_free(index.device):
            those = set(rows[0].tolist())
            if not self._those.isdisjoint(those):
                self.take_in()
            self._those |= those
        if len(self._index):
            own = torch.searchsorted(self._index, index).clamp(max=len(self._index) - 1)
            known = self._index[own] == index
            sums = torch.add(sums, self._sums[:, own] * known, alpha=1 / worth)
        self._waiting.append(rows)
        return sums[0] / sums[1]

    def take_in(self) -> None:
        """Take in what waits; this looks at values."""
        self._index, self._sums = self._with_waiting()
        self._waiting, self._those = [], set()

    def read(self) -> RowEvidence:
        """Return the average of every index."""
        index, (sums, worth) = self._with_waiting()
        return RowEvidence(index.cpu(), (sums / worth).cpu().double())

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        index, new = zip(*self._waiting, strict=True) if self._waiting else ((), ())
        return {
            "index": self._index,
            "sums": self._sums,
            "worth": self._worth,
            "waiting_index": index or None,
            "waiting": new or None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._index, self._sums, self._worth = state["index"], state["sums"], state["worth"]
        if state["waiting"] is not None:
            self._waiting = list(zip(state["waiting_index"], state["waiting"], strict=True))
            self._those = set(torch.cat(state["waiting_index"]).tolist())

    def to(self, device: torch.device) -> None:
        """Move to where the rows will be."""
        self._index, self._sums = self._index.to(device), self._sums.to(device)
        self._waiting = [(index.to(device), new.to(device)) for index, new in self._waiting]

    def _with_waiting(self) -> tuple[Tensor, Tensor]:
        """Return indices and sums with those that wait, in new tensors."""
        index, sums = self._index, self._sums
        if not self._waiting:
            return index, sums
        waiting = [torch.cat(parts, -1) for parts in zip(*self._waiting, strict=True)]
        counted = waiting[1][1] > 0
        rows, new = waiting[0][counted], waiting[1][:, counted]
        index, sums = _with_room(index, sums, rows)
        places = torch.searchsorted(index, rows)
        return index, sums.index_add_(1, places, new, alpha=self._worth)


def _with_room(index: Tensor, sums: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return sorted indices, the wanted ones among them, and their sums, in new tensors."""
    new = wanted.unique()
    if len(index):
        places = torch.searchsorted(index, new).clamp(max=len(index) - 1)
        new = new[index[places] != new]
    if not len(new):
        return index, sums.clone()
    places = torch.searchsorted(index, new) + torch.arange(len(new), device=new.device)
    is_old = torch.ones(len(index) + len(new), dtype=torch.bool, device=index.device)
    is_old[places] = False
    merged, grown = index.new_empty(len(is_old)), sums.new_zeros(2, len(is_old))
    merged[places], merged[is_old], grown[:, is_old] = new, index, sums
    return merged, grown
