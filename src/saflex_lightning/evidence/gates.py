r"""Which groups of augmented rows pass.

The evidence of single rows is mostly noise; its mean over a group, gathered over many steps, is
not. A group is touched only while that mean is below zero by three standard errors: many groups are
looked at in every step, and what does no harm must stay as it is.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .weights import Array, host_array, host_copy

__all__ = ["FEWEST_STEPS", "STANDARD_ERRORS", "Gates"]

_DECAY = 0.98  # of what is gathered, per step that shows the group
FEWEST_STEPS = 10.0  # steps, faded ones counting less, before a group is judged
STANDARD_ERRORS = 3.0  # standard errors below zero at which a group is taken to do harm
_STEP = 0.2  # change of log w
_LOWEST = -6.0  # of log w: a few rows always pass, so that every group can recover


class Gates:
    r"""Let fewer rows of harmful groups through.

    With m the mean evidence of a group's rows in one step, weighed by what its rows are believed,
    running sums give mean and standard error of m:

    .. math::
        \log w_g \leftarrow \log w_g - 0.2 \;\text{ where } \bar m_g + 3\, \mathrm{se}_g < 0, \qquad
        \log w_g + 0.2 \;\text{ where } \bar m_g > 0,

    between -6 and 0. A row is kept with probability w of its group.
    """

    def __init__(self) -> None:
        self.log_weights: Array | None = None  # (groups,)
        self._sums: Array | None = None  # of 1, m and its square, (3, groups)

    def start(self, num_groups: int) -> None:
        """Make the gates of a fit, unless a checkpoint brought them."""
        if self.log_weights is None or self._sums is None:
            self.log_weights, self._sums = np.zeros(num_groups), np.zeros((3, num_groups))

    @property
    def all_open(self) -> bool:
        """Whether no row is rejected."""
        return self.log_weights is None or not self.log_weights.any()

    @property
    def passing(self) -> Array:
        """Share of the rows of each group that pass, ``(groups,)``."""
        assert self.log_weights is not None
        return np.exp(self.log_weights)

    def draw(self, group: Tensor, generator: torch.Generator) -> Tensor:
        """Draw which rows are rejected."""
        # Drawn on the CPU, so that the draws of a seed are the same on every device.
        draws = torch.rand(group.shape, generator=generator).to(group.device, non_blocking=True)
        return draws >= host_copy(self.passing, draws)[group]

    def update(self, means: Array, present: NDArray[np.bool_]) -> None:
        """Take in each group's mean evidence, where a step has ``present`` it, and move."""
        assert self.log_weights is not None
        assert self._sums is not None
        known = present & np.isfinite(means)
        means = np.where(known, means, 0)
        new = _DECAY * self._sums + np.stack([np.ones_like(means), means, means**2])
        self._sums = np.where(known, new, self._sums)
        mean, error = self.read()
        harms = (mean + STANDARD_ERRORS * error < 0) & (self._sums[0] > FEWEST_STEPS)
        change = _STEP * ((mean > 0).astype(float) - harms)
        moved = (self.log_weights + np.where(known, change, 0)).clip(_LOWEST, 0)
        moved[0] = 0  # clean rows
        self.log_weights = moved

    @property
    def steps(self) -> Array:
        """How many steps have shown each group, faded ones counting less, ``(groups,)``."""
        assert self._sums is not None
        return self._sums[0]

    def read(self) -> tuple[Array, Array]:
        """Return mean evidence of each group and its standard error, ``(groups,)`` each."""
        assert self._sums is not None
        count, total, squares = self._sums
        count = count.clip(1)
        mean = total / count
        return mean, np.sqrt((squares / count - mean**2).clip(0) / count)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        state = {"log_weights": self.log_weights, "sums": self._sums}
        return {n: None if v is None else torch.from_numpy(v) for n, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["log_weights"] is not None:
            self.log_weights = host_array(state["log_weights"])
            self._sums = host_array(state["sums"])
