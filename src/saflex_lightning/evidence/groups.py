"""What groups of augmented rows do to the validation loss.

The evidence of single rows is mostly noise; its mean over a group, gathered over many steps, is
not. It tells which operations and generators help and which harm, where the labels that are wrong
fit their rows, so that no row gives itself away.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .weights import Array, host_array

__all__ = ["FEWEST_STEPS", "STANDARD_ERRORS", "GroupMeans"]

_DECAY = 0.98  # of what is gathered, per step that shows the group
FEWEST_STEPS = 10.0  # steps, faded ones counting less, before a group is judged
STANDARD_ERRORS = 3.0  # many groups are looked at, so that two would often be chance


class GroupMeans:
    """Running mean and standard error of the mean evidence of each group's rows in one step.

    There are two means: of all rows, which says what the group does as it is, and of rows by their
    belief to the power a, which says what it does once rows are weighed.
    """

    def __init__(self) -> None:
        self._sums: Array | None = None  # of 1, the means and their squares, (3, 2, groups)

    def start(self, num_groups: int) -> None:
        """Make the sums of a fit, unless a checkpoint brought them."""
        if self._sums is None:
            self._sums = np.zeros((3, 2, num_groups))

    def update(self, means: Array, present: NDArray[np.bool_]) -> Array:
        """Take in each group's mean evidence, ``(2, groups)``, where a step has ``present`` it.

        Returns:
            1 where the weighed group helps, -1 where it harms beyond three standard errors, else 0;
            0 for clean rows and groups that were not shown, ``(groups,)``.
        """
        assert self._sums is not None
        known = present & np.isfinite(means).all(0)
        means = np.where(known, means, 0)
        new = _DECAY * self._sums + np.stack([np.ones_like(means), means, means**2])
        self._sums = np.where(known, new, self._sums)
        mean, error = self.read()
        harms = (mean[1] + STANDARD_ERRORS * error[1] < 0) & (self.steps > FEWEST_STEPS)
        verdicts = np.where(known, (mean[1] > 0).astype(float) - harms, 0)
        verdicts[0] = 0
        return verdicts

    @property
    def steps(self) -> Array:
        """How many steps have shown each group, faded ones counting less, ``(groups,)``."""
        assert self._sums is not None
        return self._sums[0, 0]

    def read(self) -> tuple[Array, Array]:
        """Return both means of each group and their standard errors, ``(2, groups)`` each."""
        assert self._sums is not None
        count, total, squares = self._sums
        count = count.clip(1)
        mean = total / count
        return mean, np.sqrt((squares / count - mean**2).clip(0) / count)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"sums": None if self._sums is None else torch.from_numpy(self._sums)}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore what `state_dict` returned."""
        self._sums = None if state["sums"] is None else host_array(state["sums"])
