"""The gradient that steers, over ranks and over refreshes."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from saflex_lightning.engines.direction import Direction, descent_direction, joint_norm
from saflex_lightning.functional.settings import Settings

__all__ = ["ValidationGradient"]


class ValidationGradient:
    r"""Keep the direction that steers: the validation gradient, averaged over refreshes.

    .. math:: \bar g \leftarrow d^n \bar g + (1 - d^n)\, g

    n training batches after the last refresh, started at the first finite g. A non-finite g leaves
    the average as it was and makes the solve of that one step unusable.
    """

    def __init__(self, settings: Settings) -> None:
        self.direction: Direction  # once there is one; its length is NaN until a gradient is finite
        self._decay = settings.gradient_decay
        self._interval = settings.refresh_every_n_steps
        self._state: dict[str, Any] = {
            "refreshed": None,  # number of the training batch of the last refresh
            "average": None,
            "direction": None,
            "length": None,
            "started": None,
            "finite": None,
            "norm": None,
        }

    @property
    def norm(self) -> Tensor:
        """Norm of the newest gradient before averaging, scalar."""
        return self._state["norm"]

    def is_due(self, number: int) -> bool:
        """Say whether a training batch calls for a new gradient."""
        refreshed = self._state["refreshed"]
        return refreshed is None or number >= refreshed + self._interval

    def direction_at(self, number: int) -> Direction:
        """Return the direction of a training batch, of length NaN if its gradient is not finite."""
        parts, length = self.direction
        if number == self._state["refreshed"]:
            length = _length_where(self._state["finite"], length)
        return Direction(parts, length)

    def update(
        self,
        number: int,
        gradient: Sequence[Tensor],
        second_moments: Sequence[Tensor] | None = None,
    ) -> None:
        """Take the new gradient of a training batch into the average and derive the direction."""
        state = self._state
        state["norm"] = joint_norm(gradient)
        finite = state["finite"] = torch.isfinite(state["norm"])
        if state["average"] is None:
            state["average"] = tuple(torch.zeros_like(part) for part in gradient)
            state["started"] = torch.zeros_like(finite)
        elapsed = number - (state["refreshed"] or 0)
        share = torch.where(state["started"], 1 - self._decay**elapsed, 1.0)
        for average, new in zip(state["average"], gradient, strict=True):
            average.lerp_(torch.where(finite, new, average), share.to(average.dtype))
        state["started"] = state["started"] | finite
        state["refreshed"] = number
        state["direction"] = None
        self.direction = Direction((), state["norm"])  # their memory serves the next one
        parts, length = descent_direction(state["average"], second_moments)
        self.direction = Direction(parts, _length_where(state["started"], length))
        state["direction"], state["length"] = self.direction

    def to(self, device: torch.device) -> None:
        """Move the tensors, after `load_state_dict`."""
        self._state = apply_to_collection(self._state, Tensor, lambda tensor: tensor.to(device))
        self.direction = Direction(self._state["direction"], self._state["length"])

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # Averages are updated in place: the dictionary's own tensors must stay as they are.
        self._state = apply_to_collection(dict(state), Tensor, torch.clone)


def _length_where(is_finite: Tensor, length: Tensor) -> Tensor:
    """Return a length, or NaN, without waiting for what decides."""
    return length.masked_fill(~is_finite, torch.nan)
