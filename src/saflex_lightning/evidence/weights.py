r"""How much a row counts: its belief, to a power and with an offset that its group learns.

The belief of an augmented row is the probability that its label is right. With the posterior q of
the label under the discriminant, and the group's share of wrong labels known to be epsilon, it is

.. math:: r_i = \frac{(1 - \epsilon)\, q_i}{(1 - \epsilon)\, q_i + \epsilon\, (1 - q_i) / (K - 1)},

which is averaged over epsilon by how likely each makes the newest rows of the group. Beside clean
rows nothing is held against q itself (epsilon = 1 - 1/K): an augmented row must then compete with
clean ones. The weight is

.. math:: \log v_i = \min(0.7,\; a_g \log r_i + b_g),

1 for clean rows; a and b ascend the evidence of the weighted batch

.. math:: m = \frac{\sum_i v_i s_i}{\sum_i v_i},

where s is the gradient inner product of the given label over the root mean square of all of them.
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["NOISE", "GroupWeights", "beliefs", "log_likelihoods"]

NOISE = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MEMORY = 30  # steps in which a group's likelihoods fade
_RATE = 0.02  # of Adam
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_POWERS = (-1.0, 10.0)  # of a; below 0 it counts as 0, so that it can come back
_OFFSETS = (-6.0, 0.7)  # of b
_MOST = 0.7  # of log v
_SURE = 1e-4  # posteriors are between this and 1 minus this


class GroupWeights:
    """Two numbers per group, learned, and the likelihood of each share of wrong labels.

    Args:
        is_on: Otherwise all weights are 1.
    """

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._state: dict[str, Any] = {
            "powers": None,  # a, (groups,)
            "offsets": None,  # b, (groups,)
            "moments": None,  # of Adam: mean and square of the gradients of both, (2, 2, groups)
            "steps": None,  # of Adam, scalar int64
            "likelihoods": None,  # of each share of wrong labels, in logarithms, (groups, shares)
        }

    def start(self, num_groups: int, device: torch.device) -> None:
        """Make the numbers of a fit, unless a checkpoint brought them."""
        state = self._state
        if state["powers"] is None:
            state["powers"] = torch.ones(num_groups)
            state["offsets"] = torch.zeros(num_groups)
            state["moments"] = torch.zeros(2, 2, num_groups)
            state["steps"] = torch.zeros(())
            state["likelihoods"] = torch.zeros(num_groups, len(NOISE))
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)

    def log_beliefs(
        self, posteriors: Tensor, group: Tensor, classes: int, *, alone: bool
    ) -> Tensor:
        """Return log r of rows, whose labels have these posteriors, ``(rows,)``."""
        posteriors = posteriors.clamp(_SURE, 1 - _SURE)
        if alone:
            shares = self._state["likelihoods"].softmax(1)[group].to(posteriors)
            posteriors = (beliefs(posteriors, classes) * shares).sum(1).clamp(min=_SURE)
        return posteriors.log()

    def log_weights(self, log_beliefs: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return log v of rows, and what of it is due to the row and not to its group's offset."""
        if not self.is_on:
            return torch.zeros_like(log_beliefs), torch.zeros_like(log_beliefs)
        own = self._state["powers"].clamp(min=0)[group].to(log_beliefs) * log_beliefs
        return (own + self._state["offsets"][group].to(own)).clamp(max=_MOST), own

    def ascend(self, powers: Tensor, offsets: Tensor, taught: Tensor) -> None:
        """Take one step of Adam along the gradients of m, ``(groups,)`` each.

        ``taught`` is 1, or 0 where the step showed no row: then nothing changes.
        """
        state = self._state
        state["steps"] = state["steps"] + taught
        gradient = torch.stack([powers, offsets]).nan_to_num(0, 0, 0).to(state["moments"])
        changed = []
        for moment, new, beta in zip(
            state["moments"], (gradient, gradient.square()), _BETAS, strict=True
        ):
            moment.lerp_(new, (1 - beta) * taught)
            # 1 - beta ** steps; where no step was taken there is nothing to divide.
            changed.append(moment / -torch.expm1(math.log(beta) * state["steps"].clamp(min=1)))
        mean, square = changed
        change = taught * _RATE * mean / (square.sqrt() + _EPSILON)
        state["powers"] = (state["powers"] + change[0]).clamp(*_POWERS)
        state["offsets"] = (state["offsets"] + change[1]).clamp(*_OFFSETS)

    def watch(self, likelihoods: Tensor, taught: Tensor) -> None:
        """Take in the sums of a step's log-likelihoods, ``(groups, shares)``; see `ascend`."""
        kept = self._state["likelihoods"] * (1 - taught / _MEMORY)
        self._state["likelihoods"] = kept + likelihoods.to(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        moments = self._state["moments"]  # the only one that is updated in place
        return {**self._state, "moments": None if moments is None else moments.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._state = dict(state)
        if state["moments"] is not None:
            self._state["moments"] = state["moments"].clone()


def beliefs(posteriors: Tensor, classes: int) -> Tensor:
    """Return r of rows for each share of wrong labels, ``(rows, shares)``."""
    right, wrong = _right_and_wrong(posteriors, classes)
    return right / (right + wrong)


def log_likelihoods(posteriors: Tensor, classes: int) -> Tensor:
    """Return how likely each share of wrong labels makes rows, ``(rows, shares)``."""
    right, wrong = _right_and_wrong(posteriors.clamp(_SURE, 1 - _SURE), classes)
    return (right + wrong).log()


def _right_and_wrong(posteriors: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    noise, column = posteriors.new_tensor(NOISE), posteriors.unsqueeze(1)
    return column * (1 - noise), (1 - column) * noise / max(classes - 1, 1)
