r"""Which groups of augmented rows pass.

The evidence of single rows is mostly noise; its mean over a group, gathered over many steps, is
not. A group is touched only while that mean is below zero by three standard errors: many groups are
looked at in every step, and what does no harm must stay as it is.
"""

from typing import Any

import torch
from torch import Tensor

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
        self.log_weights: Tensor | None = None  # (groups,)
        self._sums: Tensor | None = None  # of 1, m and its square, (3, groups)

    def start(self, num_groups: int, device: torch.device) -> None:
        """Make the gates of a fit, unless a checkpoint brought them."""
        if self.log_weights is None or self._sums is None:
            self.log_weights = torch.zeros(num_groups)
            self._sums = torch.zeros(3, num_groups)
        self.log_weights, self._sums = self.log_weights.to(device), self._sums.to(device)

    def draw(self, group: Tensor, generator: torch.Generator) -> Tensor:
        """Draw which rows are rejected."""
        assert self.log_weights is not None
        # Drawn on the CPU, so that the draws of a seed are the same on every device.
        draws = torch.rand(group.shape, generator=generator)
        return draws.to(group.device, non_blocking=True) >= self.log_weights.exp()[group]

    def update(self, means: Tensor, present: Tensor) -> None:
        """Take in each group's mean evidence, where a step has ``present`` it, and move."""
        assert self.log_weights is not None
        assert self._sums is not None
        known = present & means.isfinite()
        means = torch.where(known, means, 0).to(self._sums)
        new = _DECAY * self._sums + torch.stack([torch.ones_like(means), means, means.square()])
        self._sums = torch.where(known, new, self._sums)
        mean, error = self.read()
        harms = (mean + STANDARD_ERRORS * error < 0) & (self._sums[0] > FEWEST_STEPS)
        change = _STEP * ((mean > 0).to(mean) - harms.to(mean))
        moved = (self.log_weights + torch.where(known, change, 0)).clamp(_LOWEST, 0)
        moved[0] = 0  # clean rows
        self.log_weights = moved

    @property
    def steps(self) -> Tensor:
        """How many steps have shown each group, faded ones counting less, ``(groups,)``."""
        assert self._sums is not None
        return self._sums[0]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return mean evidence of each group and its standard error, ``(groups,)`` each."""
        assert self._sums is not None
        count, total, squares = self._sums
        count = count.clamp(min=1)
        mean = total / count
        return mean, ((squares / count - mean.square()).clamp(min=0) / count).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"log_weights": self.log_weights, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.log_weights, self._sums = state["log_weights"], state["sums"]
