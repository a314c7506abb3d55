"""The gradient that steers, over ranks and over refreshes."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .engines import Tangent, foreach, make_tangent
from .functional import Preset, ReduceSum

__all__ = ["ValidationGradient"]


class ValidationGradient:
    r"""Keep the direction that steers: the validation gradient over ranks and over refreshes.

    .. math:: \bar g \leftarrow d^n \bar g + (1 - d^n)\, g

    n training batches after the last refresh, started at the first finite g. A non-finite g leaves
    the average as it was and makes the solve of that one step unusable.

    Args:
        preset: Tells decay and refresh interval.
    """

    def __init__(self, preset: Preset) -> None:
        self._decay = preset.gradient_decay
        self._interval = preset.refresh_every_n_steps
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
    def tangent(self) -> Tangent:
        """The direction in use, from `make_tangent`."""
        return Tangent(self._state["direction"], self._state["length"])

    @property
    def norm(self) -> Tensor:
        """Norm of the newest gradient before averaging, scalar."""
        return self._state["norm"]

    def is_due(self, number: int) -> bool:
        """Say whether a training batch calls for a new gradient.

        Args:
            number: Number of the training batch.

        Returns:
            True at the first batch and from ``refresh_every_n_steps`` after the last refresh on.
        """
        refreshed = self._state["refreshed"]
        return refreshed is None or number >= refreshed + self._interval

    def is_usable(self, number: int) -> Tensor:
        """Say whether the direction may be used at a training batch, without waiting for it.

        Args:
            number: Number of the training batch.

        Returns:
            Scalar bool: False before the first finite gradient, and at a batch whose own gradient
            was not finite.
        """
        if number == self._state["refreshed"]:
            return self._state["started"] & self._state["finite"]
        return self._state["started"]

    def refresh(
        self,
        number: int,
        gradient: Sequence[Tensor],
        second_moments: Sequence[Tensor] | None = None,
        *,
        reduce_sum: ReduceSum | None = None,
        world_size: int = 1,
    ) -> None:
        """Take a new gradient into the average and derive the direction from it.

        Args:
            number: Number of the training batch.
            gradient: g of this rank, one tensor per parameter.
            second_moments: Adam's, see `make_tangent`.
            reduce_sum: Adds one flat tensor over ranks.
            world_size: Number of ranks.
        """
        if reduce_sum is not None:
            flat = reduce_sum(torch.cat([part.reshape(-1) for part in gradient])) / world_size
            pieces = flat.split([part.numel() for part in gradient])
            gradient = [
                piece.view_as(part).to(part.dtype)  # the flat one has the widest of all
                for piece, part in zip(pieces, gradient, strict=True)
            ]
        state = self._state
        state["norm"] = foreach.norm(gradient)
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
        state["direction"] = None  # its memory serves the next one
        state["direction"], state["length"] = make_tangent(state["average"], second_moments)

    def to(self, device: torch.device) -> None:
        """Move the tensors, after `load_state_dict`.

        Args:
            device: Where the parameters live.
        """
        self._state = apply_to_collection(self._state, Tensor, lambda tensor: tensor.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        # Averages are updated in place: the dictionary's own tensors must stay as they are.
        self._state = apply_to_collection(dict(state), Tensor, torch.clone)
