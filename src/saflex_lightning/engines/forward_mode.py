"""The exact engine: one forward pass on dual numbers."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saflex_lightning.functional.losses import Scores, map_scores, widen

from .direction import Direction
from .engine import Finish
from .gradient import loss_gradient, refuse_unsupported
from .parameters import replaced_parameters
from .untouched import extra_pass, untouched

__all__ = ["ForwardModeEngine"]

_INSTEAD = "Pass engine='finite_difference' or engine='head'."


class ForwardModeEngine:
    """Compute Z exactly by forward-mode differentiation, before the training forward.

    Runs without a graph. Attention uses the plain kernel and recurrent layers the native one,
    since the fused ones have no forward mode. A custom ``autograd.Function`` needs a ``jvp``.
    """

    name = "forward_mode"
    repeats_forward = True

    def __init__(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        self.module = module
        self.params = list(params)

    def gradient(
        self, run: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the loss; see `loss_gradient`."""
        return loss_gradient(self.module, self.params, run, loss, engine=self.name)

    def jvp(self, run: Callable[[], Scores], direction: Direction) -> Finish:
        """Run the training forward on dual numbers, in full precision, and leave no trace."""

        def dual() -> Scores:
            with (
                untouched(self.module),
                extra_pass(self.module),
                _differentiable_kernels(self.module),
                forward_ad.dual_level(),
            ):
                duals = [
                    forward_ad.make_dual(parameter.detach(), part.to(parameter.dtype))
                    for parameter, part in zip(self.params, direction.parts, strict=True)
                ]
                with replaced_parameters(self.module, self.params, duals):
                    return map_scores(_tangent_of, run())

        guard = refuse_unsupported(self.module, self.name, _INSTEAD, plain=run, retry=dual)
        with torch.no_grad(), guard:
            jvp = map_scores(lambda part: widen(part) * direction.norm, dual())
        return Finish(lambda _scores: jvp)


def _tangent_of(scores: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(scores).tangent
    return torch.zeros_like(scores) if tangent is None else tangent.clone()


@contextmanager
def _differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Choose kernels that have a forward mode."""
    has_recurrence = any(isinstance(part, nn.RNNBase) for part in module.modules())
    with ExitStack() as stack:
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for library in (torch, sys.modules["torch.nn.utils.weight_norm"]):
            stack.callback(setattr, library, "_weight_norm", vars(library)["_weight_norm"])
            vars(library)["_weight_norm"] = _weight_norm
        backends: Any = torch.backends
        for backend in (backends.mkldnn, backends.cudnn) if has_recurrence else ():
            # Their own `flags` would reset every other setting as well.
            stack.callback(setattr, backend, "enabled", backend.enabled)
            backend.enabled = False
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return what torch's fused kernel does, which has no forward mode."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
