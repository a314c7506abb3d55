"""What an engine is: the derivative of a batch's scores along a direction of parameters.

docs/how-to/engines.md compares them. A new one is a class with these methods, and a line in
`choose.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from saflex_lightning.functional.losses import Scores

from .direction import Direction

__all__ = ["Engine", "Finish"]


@dataclass(frozen=True)
class Finish:
    """The second half of `Engine.jvp`.

    Attributes:
        of: Returns Z, detached, of the scores that the training forward returned.
        close: Gives it up where the forward failed.
    """

    of: Callable[[Scores], Scores]
    close: Callable[[], None] = lambda: None


class Engine(Protocol):
    """Two gradients in one: of the validation loss, and of the scores along a direction."""

    @property
    def name(self) -> str:
        """One of `EngineName`."""
        ...

    @property
    def repeats_forward(self) -> bool:
        """Whether the training forward runs more than once in a step."""
        ...

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are matched."""
        ...

    def gradient(
        self, run: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the loss of the scores that ``run`` computes, one per parameter.

        The model runs in the mode it is in: the caller puts it in evaluation, and back.
        """
        ...

    def jvp(self, run: Callable[[], Scores], direction: Direction) -> Finish:
        """Do what must come before the training forward ``run``, and return how it is finished.

        The caller then runs the forward itself, once.
        """
        ...
