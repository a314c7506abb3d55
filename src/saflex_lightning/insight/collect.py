"""Collect what steps tell of rows and groups, in bounded memory, the same on all ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.step import StepRows

__all__ = ["Collector", "GroupCounts", "RowTable", "WeightHistory"]

STEPS_PER_FLUSH = 64  # that stay on their device before they are added up
_BINS, _MOST = 40, 2.0  # of the histogram of weights
_VISIT_DECAY = 0.7  # of the weights of earlier visits of a row, per visit
_MOST_POINTS = 512  # of the history
_LEAST = 1e-200  # what has faded to this fades no more
_FACTS = ("label", "suggested", "group")


@dataclass(frozen=True)
class Packed:
    """Augmented rows of several steps and all ranks, in the order of the steps.

    ``index`` is None where rows have no identity; labels are -1 where there is none.
    """

    index: NDArray[np.int64] | None
    group: NDArray[np.int64]
    label: NDArray[np.int64]
    suggested: NDArray[np.int64]
    belief: NDArray[np.float64]
    weight: NDArray[np.float64]


class RowTable:
    """The newest facts of every row, known by its index, and its mean weight over its visits.

    Args:
        max_rows: At most so many rows are held, of 64 bytes each; later ones are only counted.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.index = np.zeros(0, dtype=np.int64)  # sorted
        self.facts = {name: np.zeros(0, dtype=np.int64) for name in _FACTS}
        self.beliefs = np.zeros(0)  # NaN where nobody knows
        self.visits = np.zeros(0, dtype=np.int64)
        self.sums = np.zeros((2, 0))  # of visits and their weights
        self.left_out = 0  # visits of rows for which there was no room

    def update(self, rows: Packed) -> None:
        """Take in rows, the newest ones last."""
        if rows.index is None or not len(rows.index):
            return
        self._make_room(np.unique(rows.index))
        places = np.searchsorted(self.index, rows.index).clip(max=len(self.index) - 1)
        there = self.index[places] == rows.index
        self.left_out += int((~there).sum())
        places = places[there]
        self.visits += np.bincount(places, minlength=len(self.index))
        fading = _VISIT_DECAY ** _later_ones(places)
        self.sums *= _VISIT_DECAY ** np.bincount(places, minlength=len(self.index))
        self.sums[0] += np.bincount(places, fading, len(self.index))
        self.sums[1] += np.bincount(places, fading * rows.weight[there], len(self.index))
        for column in _FACTS:
            _put_newest(self.facts[column], places, getattr(rows, column)[there])
        _put_newest(self.beliefs, places, rows.belief[there])

    @property
    def weights(self) -> NDArray[np.float64]:
        """Mean weight of every row over its visits, the newest ones counting most."""
        return self.sums[1] / self.sums[0]

    def find(self, index: int) -> int | None:
        """Return the place of a row, if it is held."""
        place = int(np.searchsorted(self.index, index))
        return place if place < len(self.index) and self.index[place] == index else None

    def _make_room(self, found: NDArray[np.int64]) -> None:
        new = np.setdiff1d(found, self.index, assume_unique=True)
        new = new[: self.max_rows - len(self.index)]
        if len(new):
            places = np.searchsorted(self.index, new)
            self.index = np.insert(self.index, places, new)
            self.facts = {name: np.insert(old, places, -1) for name, old in self.facts.items()}
            self.beliefs = np.insert(self.beliefs, places, np.nan)
            self.visits = np.insert(self.visits, places, 0)
            self.sums = np.insert(self.sums, places, 0.0, axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "index": torch.from_numpy(self.index),
            "facts": {name: torch.from_numpy(old.copy()) for name, old in self.facts.items()},
            "beliefs": torch.from_numpy(self.beliefs.copy()),
            "visits": torch.from_numpy(self.visits.copy()),
            "sums": torch.from_numpy(self.sums.copy()),
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.index = state["index"].numpy()
        self.facts = {name: state["facts"][name].numpy().copy() for name in _FACTS}
        for name in ("beliefs", "visits", "sums"):
            setattr(self, name, state[name].numpy().copy())
        self.left_out = state["left_out"]


def _later_ones(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many equal values follow each one."""
    order = values.argsort(kind="stable")
    _, counts = np.unique(values, return_counts=True)
    later = np.empty_like(values)
    later[order] = np.repeat(counts.cumsum(), counts) - 1 - np.arange(len(values))
    return later


def _put_newest(values: NDArray[Any], places: NDArray[np.int64], new: NDArray[Any]) -> None:
    """Put values in their places; of several for one the last, the first of them in reverse."""
    newest, first = np.unique(places[::-1], return_index=True)
    values[newest] = new[::-1][first]


class GroupCounts:
    """Sums over the rows of every group and class, ``(groups, classes)`` each.

    ``rows`` counts augmented rows. The others fade, see `fade`: ``shown`` counts them too,
    ``weight`` is the sum of their weights, ``judged`` counts those with a label suggested,
    ``doubted`` those where it is another one than the given, and ``belief`` is the sum over the
    judged ones. Rows without a label count as class 0.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((6, 0, 0))

    def update(self, rows: Packed) -> None:
        """Take in rows."""
        if not len(rows.group):
            return
        label = rows.label.clip(min=0)
        grown = np.maximum(self.sums.shape[1:], [rows.group.max() + 1, label.max() + 1])
        by = [(0, int(new - old)) for new, old in zip(grown, self.sums.shape[1:], strict=True)]
        self.sums = np.pad(self.sums, [(0, 0), *by])
        judged = (rows.suggested >= 0) & (rows.label >= 0)
        ones = np.ones(len(label))
        values = (
            ones,
            ones,
            rows.weight,
            judged,
            judged & (rows.suggested != rows.label),
            np.where(judged, rows.belief, 0.0),
        )
        for sums, column in zip(self.sums, values, strict=True):
            np.add.at(sums, (rows.group, label), column)

    def fade(self) -> None:
        """Let what is thought of rows count half; each epoch knows better than the one before."""
        self.sums[1:, self.sums[1] > _LEAST] *= 0.5

    @property
    def rows(self) -> NDArray[np.float64]:
        """How many rows of each group and class were shown, ``(groups, classes)``."""
        return self.sums[0]


class WeightHistory:
    """How weights are spread, and mean weight of each group over the steps.

    At most 512 points are held: of twice as many every second one stays.
    """

    def __init__(self) -> None:
        self.histogram = np.zeros(_BINS)
        self.points: list[tuple[int, int, float]] = []  # step, group, mean weight
        self._stride, self._calls = 1, 0

    @property
    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins; what is larger counts in the last one."""
        return np.linspace(0, _MOST, _BINS + 1)

    def update(self, rows: Packed, step: int) -> None:
        """Take in the rows up to a step."""
        self.histogram += np.histogram(rows.weight.clip(0, _MOST), self.edges)[0]
        self._calls += 1
        if self._calls % self._stride or not len(rows.group):
            return
        shown = np.bincount(rows.group)
        weight = np.bincount(rows.group, rows.weight)
        for group in np.flatnonzero(shown):
            self.points.append((step, int(group), weight[group] / shown[group]))
        if len(self.points) > _MOST_POINTS:
            steps = sorted({point[0] for point in self.points})[1::2]
            self.points = [point for point in self.points if point[0] in set(steps)]
            self._stride *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "histogram": torch.from_numpy(self.histogram.copy()),
            "points": torch.tensor(self.points, dtype=torch.float64).reshape(-1, 3),
            "stride": self._stride,
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.histogram = state["histogram"].numpy().copy()
        self.points = [(int(s), int(g), w) for s, g, w in state["points"].tolist()]
        self._stride, self._calls = state["stride"], state["calls"]


class Collector:
    """Everything that is collected; rows of the newest steps wait on their device.

    Args:
        max_rows: See `RowTable`.
    """

    def __init__(self, max_rows: int) -> None:
        self.table = RowTable(max_rows)
        self.counts = GroupCounts()
        self.history = WeightHistory()
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: StepRows) -> bool:
        """Take in the rows of a step, and say whether it is time to add up."""
        self._waiting.append(_pack(rows, len(self._waiting)))
        return len(self._waiting) >= STEPS_PER_FLUSH

    def flush(self, ranks: Ranks, step: int) -> None:
        """Add up what waits, over the ranks; each of them must call it."""
        if not self._waiting:
            return
        index, facts = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        index, facts = index[facts[:, 1] > 0], facts[facts[:, 1] > 0]
        room = ranks.most_rows(facts)
        index, facts = ranks.gather(index, room).cpu(), ranks.gather(facts, room).cpu()
        index, facts = index[facts[:, 1] > 0], facts[facts[:, 1] > 0]
        order = facts[:, 0].argsort(stable=True)
        rows = _unpack(index[order], facts[order])
        self.table.update(rows)
        self.counts.update(rows)
        self.history.update(rows, step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "table": self.table.state_dict(),
            "counts": torch.from_numpy(self.counts.sums.copy()),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.table.load_state_dict(state["table"])
        self.counts.sums = state["counts"].numpy().copy()
        self.history.load_state_dict(state["history"])


def _pack(rows: StepRows, step: int) -> tuple[Tensor, Tensor]:
    """Return index, and the other facts as floats, which hold integers up to 2**24 exactly."""
    none = torch.full_like(rows.shown, -1, dtype=torch.int64)
    label = none if rows.target is None else rows.target
    columns = (
        torch.full_like(none, step),
        rows.shown,
        rows.shown.long() if rows.group is None else rows.group,
        label.argmax(-1) if label.ndim == 2 else label,
        none if rows.suggested is None else rows.suggested,
        torch.full_like(rows.weights, torch.nan) if rows.beliefs is None else rows.beliefs,
        rows.weights,
        torch.full_like(none, rows.index is not None),
    )
    index = none if rows.index is None else rows.index
    return index, torch.stack([column.to(torch.float32) for column in columns], 1)


def _unpack(index: Tensor, facts: Tensor) -> Packed:
    _, _, group, label, suggested, belief, weight, known = facts.numpy().T
    group, label, suggested = (part.astype(np.int64) for part in (group, label, suggested))
    belief = np.where(suggested < 0, np.nan, belief)  # its scores told nothing
    return Packed(
        index.numpy() if known.all() else None,
        group,
        label,
        suggested,
        belief.astype(np.float64),
        weight.astype(np.float64),
    )
