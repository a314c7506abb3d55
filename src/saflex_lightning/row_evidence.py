r"""Evidence about the rows of a fixed pool: is the given label right?

Rows of a fixed pool come back every epoch, so a number of each row can be averaged over its visits.
Two numbers in [0, 1] tell right labels from wrong ones:

- the model's own probability of the given label: wrong labels are learned late;
- the posterior of the given label in a Gaussian discriminant whose class means m and shared
  covariance S come from validation features,

  .. math:: q_{ik} \propto \pi_k \exp\big(-\tfrac12 (h_i - m_k)^\top S^{-1} (h_i - m_k)\big).

The gradient inner product of the given label, averaged alike, tells them apart less well, and the
less the more the pool is memorised.
"""

from typing import Any

import torch
from torch import Tensor

from .bank import largest_size, share_rows
from .functional import ReduceSum

__all__ = ["RowAverages", "discriminant_posteriors"]

_RIDGE = 0.1  # in units of the covariance's mean diagonal
_MOST_ROWS = 10**8  # two float64 for each
_PRIOR = 1.0  # rows of average features that every class has beside its own
_FLOOR = 1e-12  # below this, a variance counts as zero


class RowAverages:
    """Average a number of each row over the steps that showed it; rows are known by their index.

    Two numbers are held for every index up to the largest one seen, on the CPU and the same on all
    ranks, so indices should be dense.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(2, 0, dtype=torch.float64)  # of the numbers, and how many

    def update(
        self,
        index: Tensor,
        values: Tensor,
        *,
        reduce_sum: ReduceSum | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Tensor:
        """Take in the numbers of one step, of this rank and of the others.

        Args:
            index: ``(rows,)`` int64, not negative; a row without an identity has -1.
            values: ``(rows,)``; what is not finite is left out.
            reduce_sum: Adds a tensor over ranks.
            rank: This process.
            world_size: Number of processes.

        Returns:
            The averages of this rank's rows, ``(rows,)`` like ``values``; the value itself where
            there is none.

        Raises:
            ValueError: If an index is too large to hold two numbers for each up to it.
        """
        counted = (index >= 0) & values.isfinite()
        columns = (index + 1, torch.where(counted, values, 0), counted)
        rows = torch.stack([column.to(torch.float64) for column in columns], 1)
        room = largest_size(rows, reduce_sum, rank, world_size)
        rows = share_rows(rows, room, reduce_sum, rank, world_size).cpu()
        keys, numbers = rows[:, 0].long(), rows[:, 1:].T
        largest = int(keys.max()) - 1 if len(keys) else -1
        if largest >= _MOST_ROWS:
            raise ValueError(
                f"Expected `index` to number the rows from 0 to less than {_MOST_ROWS:,}, but got "
                f"{largest:,}: two numbers are held for every index up to the largest. Number the "
                "rows one after the other, not by a hash."
            )
        missing = largest + 2 - self._sums.shape[1] if len(keys) else 0
        if missing > 0:
            self._sums = torch.nn.functional.pad(self._sums, (0, missing))
        self._sums.index_add_(1, keys, numbers)
        sums, counts = self._sums[:, index.cpu() + 1]
        known = (counts > 0) & (index.cpu() >= 0)
        averages = (sums / counts.clamp(min=1)).to(values)
        return torch.where(known.to(values.device), averages, values)

    def read(self) -> Tensor:
        """Return the average of every index.

        Returns:
            ``(largest index + 1,)`` float64; NaN where there was none.
        """
        sums, counts = self._sums[:, 1:]
        return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        self._sums = state["sums"]


def discriminant_posteriors(
    features: Tensor, val_features: Tensor, val_labels: Tensor, present: Tensor | None = None
) -> Tensor:
    """Return class posteriors of rows by the formula at the top of this file.

    A class mean is drawn to the mean of all rows as if one more row lay there, so that a class
    without validation rows has a small posterior instead of none.

    Args:
        features: h of training rows, ``(batch, features)``.
        val_features: h of validation rows, ``(rows, features)``.
        val_labels: ``(rows, classes)``; rows sum to 1.
        present: 1 for validation rows that count, else 0, ``(rows,)``; None counts all. The others
            are 0 in features and labels.

    Returns:
        ``(batch, classes)``; rows sum to 1.
    """
    present = torch.ones_like(val_features[:, 0]) if present is None else present
    size = present.sum().clamp(min=1)
    center = val_features.sum(0) / size
    centred = (val_features - center) * present.unsqueeze(1)
    counts = val_labels.sum(0) + _PRIOR
    means = (val_labels.T @ centred) / counts.unsqueeze(1)
    within = centred - val_labels @ means
    covariance = within.T @ within / size
    ridge = (_RIDGE * covariance.diagonal().mean()).clamp(min=_FLOOR)
    damped = covariance + ridge * torch.eye(len(center), dtype=center.dtype, device=center.device)
    factor, _ = torch.linalg.cholesky_ex(damped)
    directions = torch.cholesky_solve(means.T, factor)
    offsets = counts.log() - 0.5 * (means * directions.T).sum(1)
    return torch.softmax((features - center) @ directions + offsets, -1)
