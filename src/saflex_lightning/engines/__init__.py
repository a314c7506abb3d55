"""Engines: three ways to compute how a batch's scores move along a direction of parameters.

An engine's `gradient` makes the gradient that becomes the direction; its `measure` runs the
training forward once and returns the scores together with their tangent Z. README.md compares
them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from saflex_lightning.functional import EngineName

from .errors import UnsupportedModelError, is_out_of_memory
from .finite_difference import FiniteDifferenceEngine
from .forward_mode import ForwardModeEngine
from .gradient import evaluate, loss_gradient
from .head import HeadEngine
from .last_layer import LastLayer, LayerCalls
from .parameters import Scores, as_tuple, map_scores, select_parameters
from .rows import RowSubset
from .tangent import Tangent, adam_second_moments, make_tangent
from .unchanged import unchanged_generators, unchanged_state

__all__ = [
    "ENGINES",
    "Engine",
    "FiniteDifferenceEngine",
    "ForwardModeEngine",
    "HeadEngine",
    "LastLayer",
    "LayerCalls",
    "RowSubset",
    "Scores",
    "Tangent",
    "UnsupportedModelError",
    "adam_second_moments",
    "as_tuple",
    "evaluate",
    "is_out_of_memory",
    "loss_gradient",
    "make_engine",
    "make_tangent",
    "map_scores",
    "select_parameters",
    "unchanged_generators",
    "unchanged_state",
]


class Engine(Protocol):
    """What every engine offers; see `FiniteDifferenceEngine` for the arguments."""

    @property
    def name(self) -> str:
        """Key of `ENGINES`."""
        ...

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are matched."""
        ...

    def gradient(
        self, forward: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the mean validation loss, one tensor per parameter."""
        ...

    def measure(
        self,
        forward: Callable[[], Scores],
        tangent: Tangent,
        *,
        probe: Callable[[], Scores] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Scores, Scores]:
        """Run the training forward once; return its scores and their tangent."""
        ...


ENGINES: dict[str, type] = {
    "finite_difference": FiniteDifferenceEngine,
    "forward_mode": ForwardModeEngine,
    "head": HeadEngine,
}


def make_engine(
    name: EngineName,
    module: nn.Module,
    *,
    params: Sequence[str] | None = None,
    head: nn.Module | None = None,
) -> Engine:
    """Build the named engine for a model.

    Args:
        name: One of the keys of `ENGINES`.
        module: The model.
        params: Name patterns of the parameters to match, see `select_parameters`; not for
            ``"head"``.
        head: The layer that makes the scores, for ``"head"``; None finds it.

    Returns:
        The engine.

    Raises:
        ValueError: If the name is unknown, or ``params`` is given for ``"head"``.
    """
    if name not in ENGINES:
        raise ValueError(
            f"Expected `engine` to be one of {sorted(ENGINES)}, but got {name!r}. Choose one."
        )
    if name == "head":
        if params is not None:
            raise ValueError(
                f"Expected `params` to be None with engine='head', but got {list(params)!r}. "
                "The head engine matches the last linear layer only; remove `params`."
            )
        return HeadEngine(module, head)
    return ENGINES[name](module, select_parameters(module, params))
