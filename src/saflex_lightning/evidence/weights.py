r"""How much a row counts: its belief, to a power, and with an offset that its group learns.

The belief of an augmented row is the probability that its label is right. With the posterior q of
the label under the discriminant, and the group's share of wrong labels known to be epsilon, it is

.. math:: r_i = \frac{(1 - \epsilon)\, q_i}{(1 - \epsilon)\, q_i + \epsilon\, (1 - q_i) / (K - 1)},

which is averaged over epsilon by how likely each makes the rows of the group: of a group without
wrong labels every row is believed. The weight is

.. math:: \log v_i = \min(0.7,\; a \log r_i + b_g + c_g),

1 for clean rows. c closes a group: it falls by 0.2, down to -6, in each step while the mean
evidence of the group is below zero by three standard errors, and rises while it is above zero, up
to 0.

A network is surer of rows that it was trained on than it should be, of wrong labels too, and the
more of them it fits the less they may weigh. How much surer it is clean rows tell, whose labels are
right: by -log q, the surprise, of validation rows over that of clean ones,

.. math:: a = \min\left(10,\; 3 \max\left(1,\;
    \frac{\mathrm{mean}_{\text{validation}} (-\log q)}{\mathrm{mean}_{\text{clean}} (-\log q)}
    \right)\right),

which is 3 where no row is clean. That ratio of surprises, to the power of -6, is also what a step
counts for epsilon, times what validation rows then told, I to the power of 4 (see
`discriminant`): before a network knows much, and once it knows its rows by heart, labels do not
fit as they should. b ascends the evidence of the weighted batch

.. math:: m = \frac{\sum_i v_i s_i}{\sum_i v_i},

where s is the gradient inner product of the given label over the root mean square of all of them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "NOISE",
    "SURE",
    "Array",
    "GroupWeights",
    "host_array",
    "host_copy",
    "mixture",
]

Array = NDArray[np.float64]

NOISE = np.array((0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
_LEAST, _MOST_POWER = 3.0, 10.0  # a
_CAUTION = 6  # the power to which a network that knows its rows by heart is heeded less
_MEMORY = 30  # steps in which surprises fade
_RATE = 0.02  # of Adam
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_OFFSETS = (-6.0, 0.7)  # of b
_GATE_STEP, _LOWEST_GATE = 0.2, -6.0  # of c
_MOST = 0.7  # of log v
SURE = 1e-4  # posteriors are between this and 1 minus this


class GroupWeights:
    """An offset per group, learned, the likelihood of each share of wrong labels, and the power.

    They live on the host; what a batch needs of them is copied to where it is.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {
            "offsets": None,  # b, (groups,)
            "gates": None,  # c, (groups,)
            "moments": None,  # of Adam: mean and square of the gradient of b, (2, groups)
            "steps": 0,  # of Adam
            "likelihoods": None,  # of each share of wrong labels, in logarithms, (groups, shares)
            "most_worth": 0.0,  # that a step has counted for them
            "surprises": np.zeros(2),  # sums over clean rows, and what validation rows let expect
        }
        self._copies: dict[str, Tensor] = {}  # of what batches need, until it changes

    def start(self, num_groups: int) -> None:
        """Make the numbers of a fit, unless a checkpoint brought them."""
        state = self._state
        if state["offsets"] is None:
            state["offsets"], state["moments"] = np.zeros(num_groups), np.zeros((2, num_groups))
            state["gates"] = np.zeros(num_groups)
            state["likelihoods"] = np.zeros((num_groups, len(NOISE)))
        self._copies.clear()

    def weigh(
        self, posteriors: Tensor, group: Tensor, classes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log v of rows, what of it is not their group's offset, and what they tell of it.

        Args:
            posteriors: Of the labels of the rows, ``(rows,)``.
            group: ``(rows,)``.
            classes: How many there are.

        Returns:
            ``(rows,)`` twice, and the logarithm of how likely each share of wrong labels makes
            them, ``(rows, shares)``.
        """
        slope, level = self._copy("mixture", posteriors, lambda: mixture(classes))
        of_group = self._copy("groups", posteriors, self._of_groups)[group]
        given = torch.addcmul(level, posteriors.unsqueeze(1), slope)
        beliefs = posteriors * (of_group[:, 1:] / given).sum(1)
        own = self.power * beliefs.clamp(min=SURE).log()
        return (own + of_group[:, 0]).clamp(max=_MOST), own, given.log()

    @property
    def power(self) -> float:
        """What beliefs are taken to."""
        return min(_LEAST * self._sureness(), _MOST_POWER)

    def _sureness(self) -> float:
        """Return how much surer of clean rows than of validation rows the network is, from 1 on."""
        found, expected = self._state["surprises"]
        return max(float(expected / max(found, SURE)), 1.0)

    def ascend(self, gradient: Array) -> None:
        """Take one step of Adam along the gradient of m, ``(groups,)``."""
        state = self._state
        state["steps"] += 1
        gradient = np.nan_to_num(gradient, posinf=0, neginf=0)
        changed: list[Array] = []
        for moment, new, beta in zip(
            state["moments"], (gradient, gradient**2), _BETAS, strict=True
        ):
            moment += (1 - beta) * (new - moment)
            changed.append(moment / (1 - beta ** state["steps"]))
        mean, square = changed
        moved = state["offsets"] + _RATE * mean / (np.sqrt(square) + _EPSILON)
        state["offsets"] = moved.clip(*_OFFSETS)
        self._copies.pop("groups", None)

    def move_gates(self, verdicts: Array) -> None:
        """Close the gates of groups that harm, at -1, and open those of groups that help, at 1."""
        moved = self._state["gates"] + _GATE_STEP * verdicts
        self._state["gates"] = moved.clip(_LOWEST_GATE, 0)
        self._copies.pop("groups", None)

    def compare(self, found: float, expected: float) -> None:
        """Take in how surprising a step's clean rows were, and validation rows in their place."""
        new = np.array([found, expected])
        self._state["surprises"] = (1 - 1 / _MEMORY) * self._state["surprises"] + new

    def watch(self, likelihoods: Array, worth: float) -> None:
        """Take in the sums of a step's log-likelihoods, ``(groups, shares)``, for what it counts.

        The step that counts most so far counts 1.
        """
        state, worth = self._state, worth * self._sureness() ** -_CAUTION
        before, state["most_worth"] = state["most_worth"], max(state["most_worth"], worth)
        kept = before / state["most_worth"] * state["likelihoods"]
        state["likelihoods"] = kept + worth / state["most_worth"] * likelihoods
        self._copies.pop("groups", None)

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

    @property
    def wrong_labels(self) -> Array:
        """Estimated share of wrong labels of each group, ``(groups,)`` in [0, 0.9]."""
        return self._probabilities() @ NOISE

    def _of_groups(self) -> Array:
        """Return each group's b + c, and the probability of each share times that of right labels.

        ``(groups, 1 + shares)``.
        """
        offsets = self._state["offsets"] + self._state["gates"]
        return np.column_stack([offsets, self._probabilities() * (1 - NOISE)])

    def _probabilities(self) -> Array:
        """Return that of each share of wrong labels, ``(groups, shares)``."""
        likelihoods = self._state["likelihoods"]
        shares = np.exp(likelihoods - likelihoods.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def _copy(self, name: str, like: Tensor, make: Callable[[], Array]) -> Tensor:
        """Return numbers of the host where ``like`` is, copied once."""
        if name not in self._copies:
            self._copies[name] = host_copy(make(), like)
        return self._copies[name]


def mixture(classes: int) -> Array:
    """Return slope and level, for each share, of the likelihood of a label in its posterior."""
    level = NOISE / max(classes - 1, 1)
    return np.stack([1 - NOISE - level, level])


def host_array(tensor: Tensor) -> Array:
    """Return numbers of a tensor on the host, in memory of their own; waits for its device."""
    return tensor.cpu().double().numpy().copy()


def host_copy(values: Array, like: Tensor) -> Tensor:
    """Return numbers of the host like a tensor, without waiting for its device."""
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)
