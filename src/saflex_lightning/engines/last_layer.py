"""Which layer makes the scores: found by watching one pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from saflex_lightning.functional.losses import Scores

from .direction import whole_tensor
from .errors import UnsupportedModelError
from .head import INSTEAD, LastLayer, same_values
from .untouched import extra_pass

__all__ = ["Call", "find_last_layer", "last_layer_of", "maker_of", "watch_calls", "watched_layer"]


def find_last_layer(
    module: nn.Module,
    run: Callable[[], Scores],
    head: nn.Module | None = None,
    *,
    wanted_by: str,
) -> LastLayer:
    """Return the linear layer that makes the scores.

    Raises:
        UnsupportedModelError: If there is none, or it is frozen or computed from others.
    """
    calls, scores = watch_calls(module, run)
    return last_layer_of(module, calls, scores, head, wanted_by=wanted_by)


class Call:
    """A call of a module; of a linear layer on rows of features it keeps what went in and out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: tuple[Tensor, Tensor, int] | None = None  # and the version of the output


@torch.enable_grad()
def watch_calls(module: nn.Module, run: Callable[[], Scores]) -> tuple[list[Call], Scores]:
    """Return the calls of one pass in the order they began, and the scores.

    The graph tells whether scores are a layer's output; equal values may be those of a scale of 1.
    """
    calls: list[Call] = []
    open_calls: list[Call] = []

    def enter(part: nn.Module, _args: Any) -> None:
        call = Call(part)
        calls.append(call)
        open_calls.append(call)

    def leave(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while open_calls and open_calls[-1].module is not part:
            open_calls.pop()  # of calls that raised, and were caught
        call = open_calls.pop() if open_calls else Call(part)
        if isinstance(part, nn.Linear) and output.ndim == 2:
            call.seen = (args[0] if args else kwargs["input"], output, output._version)

    with _hooked(module, enter, leave), extra_pass(module):
        scores = run()
    return calls, scores


@contextmanager
def _hooked(module: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    parts = list(module.modules())
    handles = [part.register_forward_pre_hook(enter) for part in parts]
    handles += [part.register_forward_hook(leave, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_layer_of(
    module: nn.Module,
    calls: Sequence[Call],
    scores: Scores,
    head: nn.Module | None,
    *,
    wanted_by: str,
) -> LastLayer:
    """Return the linear layer that made the scores in some calls; see `find_last_layer`."""
    if head is not None and not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"Expected `saflex_head()` to return an `nn.Linear`, but got {type(head).__name__}. "
            f"{INSTEAD}"
        )
    names = {part: name for name, part in module.named_modules()}
    linears = [call for call in calls if isinstance(call.module, nn.Linear)]
    if head is not None:
        linears = [call for call in linears if call.module is head]
    if not linears:
        asked = "an `nn.Linear`" if head is None else f"submodule `{names.get(head, 'head')}`"
        raise UnsupportedModelError(
            f"Expected {wanted_by} to see {asked} called, but the scores used none. A "
            f"layer that `torch.compile` took is hidden: leave it out. {INSTEAD}"
        )
    last_calls = {call.module: call for call in linears}  # a layer may be called for other things
    makers = [call for call in last_calls.values() if _makes(call, scores)]
    call = (makers or linears)[-1]
    layer = call.module
    assert isinstance(layer, nn.Linear)
    last = watched_layer(module, layer, names.get(layer, "head"), wanted_by)
    if call.seen is None or not isinstance(scores, Tensor):
        raise UnsupportedModelError(
            f"Expected submodule `{last.name}` to map (batch, features) to the scores, but the "
            f"model does something else with it. {INSTEAD}"
        )
    if not makers:
        raise UnsupportedModelError(
            f"Expected the output of submodule `{last.name}` to be the scores, but they differ. "
            f"{INSTEAD}"
        )
    return last


def watched_layer(module: nn.Module, layer: nn.Linear, name: str, wanted_by: str) -> LastLayer:
    """Return the layer's watcher, after checking that its own parameters are trained."""
    if "weight" not in layer._parameters:
        raise UnsupportedModelError(
            f"Expected the weight of the last linear layer to be a parameter for {wanted_by}, but "
            f"that of `{name}` is computed from others (weight or spectral norm). {INSTEAD}"
        )
    if not layer.weight.requires_grad:
        raise UnsupportedModelError(
            f"Expected the last linear layer to be trainable for {wanted_by}, but `{name}` is "
            f"frozen. {INSTEAD}"
        )
    return LastLayer(module, layer, name, wanted_by=wanted_by)


def _makes(call: Call, scores: Scores) -> bool:
    """Say whether scores are the output of a linear layer, a linear function of its parameters."""
    layer = call.module
    if call.seen is None or not isinstance(scores, Tensor) or not isinstance(layer, nn.Linear):
        return False
    features, output, version = call.seen
    own_forward = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    if own_forward or output._version != version or not same_values(scores, output):
        return False
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None:
        return False
    whole = whole_tensor(weight)
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        expected = linear(features.to(whole), whole, None if bias is None else whole_tensor(bias))
    return torch.allclose(output.to(expected), expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def maker_of(
    calls: Sequence[Call], num_classes: int, trained: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the trained parameters of the last module called that makes one score per class.

    That is one with a matrix of its own (or one that a parametrization computes) that has as many
    entries as there are classes along some dimension; else the last one with any matrix.
    """
    fallback, kept = None, set(trained)
    for call in reversed(calls):
        own = [p for p in _own_parameters(call.module) if p in kept]
        matrices = [parameter for parameter in own if parameter.ndim > 1]
        if any(num_classes in matrix.shape for matrix in matrices):
            return own
        fallback = fallback or (own if matrices else None)
    return fallback


def _own_parameters(part: nn.Module) -> list[Tensor]:
    """Return a module's own parameters, those of its parametrizations among them."""
    if isinstance(part, nn.utils.parametrize.ParametrizationList):
        return []  # they belong to the module whose weight it computes
    own = list(part.parameters(recurse=False))
    if nn.utils.parametrize.is_parametrized(part):
        own += list(part.get_submodule("parametrizations").parameters())
    return [*own]
