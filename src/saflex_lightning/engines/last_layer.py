"""The last linear layer of a model: found, watched, and checked to make the scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .gradient import evaluate
from .parameters import Scores

__all__ = ["LastLayer", "LayerCalls"]

LayerCalls = list[tuple[Tensor, Tensor]]


class LastLayer:
    """Watch the layer whose output is the scores.

    Args:
        module: The model.
        layer: The layer; None finds the last ``nn.Linear`` called.
        wanted_by: The setting that needs it, for errors.
        instead: What to do where the model has no such layer, as an instruction.

    Raises:
        UnsupportedModelError: If the model has no linear layer, or ``layer`` is of another type.
    """

    def __init__(
        self, module: nn.Module, layer: nn.Module | None, *, wanted_by: str, instead: str
    ) -> None:
        self.module = module
        self._wanted_by = wanted_by
        self._instead = instead
        if layer is None and not self._linears():
            raise UnsupportedModelError(
                f"Expected {wanted_by} to find an `nn.Linear`, but the model has none. {instead}"
            )
        if layer is not None and not isinstance(layer, nn.Linear):
            raise UnsupportedModelError(
                f"Expected `saflex_head()` to return an `nn.Linear`, but got "
                f"{type(layer).__name__}. {instead}"
            )
        self._layer = layer
        self._checked = False

    @property
    def layer(self) -> nn.Linear | None:
        """The layer in use; None before `find`, where it was not given."""
        return self._layer

    def find(self, forward: Callable[[], Scores]) -> nn.Linear:
        """Return the layer; where it was not given, run a pass once and take the last one called.

        Args:
            forward: Computes the scores of some batch; run in evaluation mode, without a graph.

        Returns:
            The linear layer.

        Raises:
            UnsupportedModelError: If the scores use no linear layer.
        """
        if self._layer is None:
            called: list[nn.Linear] = []

            def record(part: nn.Module, _args: object, _output: object) -> None:
                if isinstance(part, nn.Linear):
                    called.append(part)

            handles = [part.register_forward_hook(record) for part in self._linears()]
            try:
                evaluate(self.module, forward)
            finally:
                for handle in handles:
                    handle.remove()
            if not called:
                raise UnsupportedModelError(
                    f"Expected {self._wanted_by} to see an `nn.Linear` called, but the scores used "
                    f"none. {self._instead}"
                )
            self._layer = called[-1]
        return self._layer

    @contextmanager
    def recorded(self) -> Iterator[LayerCalls]:
        """Record the inputs and outputs of the layer, once `find` knows it.

        Yields:
            A list that fills with one (input, output) pair per call.
        """
        calls: LayerCalls = []

        def record(
            _part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            calls.append((args[0] if args else kwargs["input"], output))

        assert self._layer is not None
        handle = self._layer.register_forward_hook(record, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def check(self, scores: Scores, calls: LayerCalls) -> Tensor:
        """Check, the first time only, that the layer's output is the scores.

        Args:
            scores: What the forward returned.
            calls: What `recorded` saw meanwhile.

        Returns:
            The scores.

        Raises:
            UnsupportedModelError: If the layer does not make the scores.
        """
        if not calls:
            raise UnsupportedModelError(
                f"Expected submodule `{self._name()}` to be called for {self._wanted_by}, but no "
                "call was seen; a compiled model hides its layers. Leave the head out of what "
                f"`torch.compile` takes. {self._instead}"
            )
        if not isinstance(scores, Tensor) or calls[-1][0].ndim != 2:
            raise UnsupportedModelError(
                f"Expected submodule `{self._name()}` to map (batch, features) to the scores, "
                f"but the model does something else with it. {self._instead}"
            )
        if not self._checked:
            output, expected = calls[-1][1].detach().to(scores.dtype), scores.detach()
            if output.shape != expected.shape or not torch.allclose(
                output, expected, rtol=0.0, atol=0.0, equal_nan=True
            ):
                raise UnsupportedModelError(
                    f"Expected the output of submodule `{self._name()}` to be the scores, but "
                    f"they differ. {self._instead}"
                )
            self._checked = True
        return scores

    def _linears(self) -> list[nn.Linear]:
        return [part for part in self.module.modules() if isinstance(part, nn.Linear)]

    def _name(self) -> str:
        names = (name for name, part in self.module.named_modules() if part is self._layer)
        return next(names, "head")
