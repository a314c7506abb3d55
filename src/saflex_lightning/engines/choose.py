"""Which engine serves a model, and for which parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from saflex_lightning.functional.losses import Scores
from saflex_lightning.functional.settings import EngineName, Settings

from .engine import Engine
from .errors import UnsupportedModelError
from .finite_difference import FiniteDifferenceEngine
from .forward_mode import ForwardModeEngine
from .head import HeadEngine
from .last_layer import find_last_layer, last_layer_of, maker_of, watch_calls, watched_layer
from .parameters import select_parameters

__all__ = ["Matching", "make_engine"]


class Matching:
    """The engine of a fit, and what it matches, as fine-tuning schedules change that."""

    def __init__(self, settings: Settings) -> None:
        self._name: EngineName = settings.engine
        self._patterns = settings.params
        self.engine: Engine
        self._is_ready = False
        self._saved: str = ""  # engine of a checkpoint, until `start`
        self.names: tuple[str, ...] = ()  # of the matched parameters, in the order of the gradient
        self.is_partial = False  # whether one layer is matched, which schedules do not widen

    def start(self, module: nn.Module) -> None:
        """Build the engine that a checkpoint names."""
        if self._saved:
            self.engine, self._is_ready = _restore(self._saved, module, self.names), True

    def fits(self, module: nn.Module, held: Sequence[Tensor]) -> bool:
        """Say whether there is an engine, and it matches what is trained now."""
        if not self._is_ready:
            return False
        table = dict(module.named_parameters(remove_duplicate=False))
        matched = [table[name] for name in self.names]
        expected = self.engine.params  # of the head engine without a bias that is frozen
        if not self.is_partial:
            expected = select_parameters(module, self._patterns, held)
        return list(map(id, matched)) == list(map(id, expected)) and all(
            parameter.requires_grad for parameter in matched
        )

    def choose(
        self,
        module: nn.Module,
        run: Callable[[], Scores],
        head: nn.Module | None,
        held: Sequence[Tensor],
    ) -> bool:
        """Build the engine for what is trained now; say whether other parameters are matched."""
        self.engine = make_engine(
            self._name, module, run, params=self._patterns, head=head, held=held
        )
        self._is_ready = True
        table: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        before, self.names = self.names, tuple(table[p] for p in self.engine.params)
        everything = select_parameters(module, self._patterns, held)
        self.is_partial = self.engine.name == "head" or len(self.names) < len(everything)
        return self.names != before

    def describe(self) -> str:
        """Return the engine and what it matches, in a few words."""
        if not self.is_partial and self._patterns is None:
            return f"engine '{self.engine.name}' over all trained parameters"
        layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in self.names))
        shown = ", ".join(f"`{layer}`" for layer in layers[:3])
        return f"engine '{self.engine.name}' over {shown}{' and others' if layers[3:] else ''}"

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        name = self.engine.name if self._is_ready else self._saved
        return {"engine": name, "names": self.names, "is_partial": self.is_partial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, before `start`."""
        self._saved, self.names = state["engine"], tuple(state["names"])
        self.is_partial = state["is_partial"]


def make_engine(
    name: EngineName,
    module: nn.Module,
    run: Callable[[], Scores] | None = None,
    *,
    params: Sequence[str] | None = None,
    head: nn.Module | None = None,
    held: Sequence[Tensor] | None = None,
) -> Engine:
    """Build the named engine for a model; ``"auto"`` chooses one.

    Args:
        name: See `Settings`.
        module: The model.
        run: Computes the scores of some batch, in evaluation mode; ``"head"`` and ``"auto"`` find
            the layer that makes them by it. It runs once.
        params: Name patterns of the parameters to match; not for ``"head"``.
        head: The linear layer that makes the scores; None finds it.
        held: Parameters that an optimizer holds; None takes every trainable one.

    Returns:
        The engine.

    Raises:
        ValueError: If a setting does not fit the engine, or no parameter is trainable.
        UnsupportedModelError: If the engine cannot serve the model.
    """
    if name not in get_args(EngineName):
        raise ValueError(
            f"Expected `name` to be one of {', '.join(sorted(get_args(EngineName)))}, but got "
            f"{name!r}. Choose one."
        )
    if name == "finite_difference":
        return FiniteDifferenceEngine(module, select_parameters(module, params, held))
    if name == "forward_mode" or (name == "auto" and params is not None):
        return ForwardModeEngine(module, select_parameters(module, params, held))
    if params is not None:
        raise ValueError(
            f"Expected `params` to be None with engine='head', but got {list(params)!r}. The head "
            "engine matches the last linear layer only; remove `params`."
        )
    if run is None:
        raise ValueError(
            f"Expected `run` with engine='{name}', but got None. Pass a function that computes the "
            "scores of some batch: the layer that makes them is found by it."
        )
    if name == "head":
        return HeadEngine(find_last_layer(module, run, head, wanted_by="engine='head'"))
    calls, scores = watch_calls(module, run)
    try:
        last = last_layer_of(module, calls, scores, head, wanted_by="engine='auto'")
        if held and not any(last.layer.weight is parameter for parameter in held):
            raise UnsupportedModelError("No optimizer holds it.")
        return HeadEngine(last)
    except UnsupportedModelError:
        everything = select_parameters(module, None, held)
        if not isinstance(scores, Tensor):  # contrastive, or several tasks
            return ForwardModeEngine(module, everything)
        maker = maker_of(calls, scores.shape[-1], everything)
        return ForwardModeEngine(module, maker or everything)


def _restore(name: str, module: nn.Module, names: Sequence[str]) -> Engine:
    """Build the engine that matches the named parameters."""
    table = dict(module.named_parameters(remove_duplicate=False))
    if name == "head":
        for layer, part in module.named_modules():
            if isinstance(part, nn.Linear) and part._parameters["weight"] is table[names[0]]:
                return HeadEngine(watched_layer(module, part, layer, "engine='head'"))
    kinds = {"forward_mode": ForwardModeEngine, "finite_difference": FiniteDifferenceEngine}
    return kinds[name](module, [table[entry] for entry in names])
