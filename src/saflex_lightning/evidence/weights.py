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

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "NOISE",
    "Array",
    "GroupWeights",
    "beliefs",
    "host_array",
    "host_copy",
    "log_likelihoods",
]

Array = NDArray[np.float64]

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

    They live on the host; what a batch needs of them is copied to where it is.

    Args:
        is_on: Otherwise all weights are 1.
    """

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._state: dict[str, Any] = {
            "powers": None,  # a, (groups,)
            "offsets": None,  # b, (groups,)
            "moments": None,  # of Adam: mean and square of the gradients of both, (2, 2, groups)
            "steps": 0,  # of Adam
            "likelihoods": None,  # of each share of wrong labels, in logarithms, (groups, shares)
        }
        self._copies: dict[str, Tensor] = {}  # of what batches need, until it changes

    def start(self, num_groups: int) -> None:
        """Make the numbers of a fit, unless a checkpoint brought them."""
        state = self._state
        if state["powers"] is None:
            state["powers"], state["offsets"] = np.ones(num_groups), np.zeros(num_groups)
            state["moments"] = np.zeros((2, 2, num_groups))
            state["likelihoods"] = np.zeros((num_groups, len(NOISE)))
        self._copies.clear()

    def log_beliefs(
        self, posteriors: Tensor, group: Tensor, classes: int, *, alone: bool
    ) -> Tensor:
        """Return log r of rows, whose labels have these posteriors, ``(rows,)``."""
        posteriors = posteriors.clamp(_SURE, 1 - _SURE)
        if alone:
            shares = self._copy("likelihoods", posteriors).softmax(1)[group]
            posteriors = (beliefs(posteriors, classes) * shares).sum(1).clamp(min=_SURE)
        return posteriors.log()

    def log_weights(self, log_beliefs: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return log v of rows, and what of it is due to the row and not to its group's offset."""
        if not self.is_on:
            return torch.zeros_like(log_beliefs), torch.zeros_like(log_beliefs)
        powers, offsets = self._copy("numbers", log_beliefs)[:, group]
        own = powers * log_beliefs
        return (own + offsets).clamp(max=_MOST), own

    def ascend(self, powers: Array, offsets: Array) -> None:
        """Take one step of Adam along the gradients of m, ``(groups,)`` each."""
        state = self._state
        state["steps"] += 1
        gradient = np.nan_to_num(np.stack([powers, offsets]), posinf=0, neginf=0)
        changed: list[Array] = []
        for moment, new, beta in zip(
            state["moments"], (gradient, gradient**2), _BETAS, strict=True
        ):
            moment += (1 - beta) * (new - moment)
            changed.append(moment / (1 - beta ** state["steps"]))
        mean, square = changed
        change = _RATE * mean / (np.sqrt(square) + _EPSILON)
        state["powers"] = (state["powers"] + change[0]).clip(*_POWERS)
        state["offsets"] = (state["offsets"] + change[1]).clip(*_OFFSETS)
        self._copies.pop("numbers", None)

    def watch(self, likelihoods: Array) -> None:
        """Take in the sums of a step's log-likelihoods, ``(groups, shares)``."""
        self._state["likelihoods"] = (1 - 1 / _MEMORY) * self._state["likelihoods"] + likelihoods
        self._copies.pop("likelihoods", None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            for name, value in self._state.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._state = {
            name: host_array(value) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        self._copies.clear()

    def _copy(self, name: str, like: Tensor) -> Tensor:
        """Return the powers and offsets, or the likelihoods, where ``like`` is."""
        if name not in self._copies:
            values = self._state["likelihoods"]
            if name == "numbers":
                values = np.stack([self._state["powers"].clip(0), self._state["offsets"]])
            self._copies[name] = host_copy(values, like)
        return self._copies[name]


def host_array(tensor: Tensor) -> Array:
    """Return numbers of a tensor on the host, in memory of their own; waits for its device."""
    return tensor.cpu().double().numpy().copy()


def host_copy(values: Array, like: Tensor) -> Tensor:
    """Return numbers of the host like a tensor, without waiting for its device."""
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)


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
