"""The exact engine: one forward pass on dual numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saflex_lightning.functional import widen

from .errors import refuse_unsupported
from .gradient import loss_gradient
from .parameters import Scores, map_scores, replaced_parameters
from .precision import full_precision
from .tangent import Tangent
from .unchanged import unchanged_state

__all__ = ["ForwardModeEngine"]


class ForwardModeEngine:
    """Compute Z exactly by forward-mode differentiation, before the training forward.

    Runs without a graph. Attention uses the plain kernel and recurrent layers the native one,
    since the fused ones have no forward mode. A custom ``autograd.Function`` needs a ``jvp``.

    Args:
        module: The model.
        params: Parameters that carry the tangent.
    """

    name = "forward_mode"

    def __init__(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        self.module = module
        self.params = list(params)

    def gradient(
        self, forward: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the validation loss; see `loss_gradient`.

        Args:
            forward: Computes the scores of a validation batch.
            loss: Computes its mean loss.

        Returns:
            One tensor per parameter.
        """
        return loss_gradient(self.module, self.params, forward, loss, engine=self.name)

    def measure(
        self,
        forward: Callable[[], Scores],
        tangent: Tangent,
        *,
        probe: Callable[[], Scores] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Scores, Scores]:
        """Run the training forward and return its scores with their tangent.

        Args:
            forward: The training forward; called exactly once, last.
            tangent: Direction of the derivative.
            probe: What the dual pass runs instead of ``forward``.
            rows: Rows of the batch that ``probe`` computes; the result has these rows.

        Returns:
            The scores with their graph, and the detached tangent of the probed rows.
        """
        probe = probe or forward

        def dual() -> Scores:
            with (
                unchanged_state(self.module),
                full_precision(self.params),
                self._kernels(),
                forward_ad.dual_level(),
            ):
                duals = [
                    forward_ad.make_dual(parameter.detach(), part.to(parameter.dtype))
                    for parameter, part in zip(self.params, tangent.direction, strict=True)
                ]
                with replaced_parameters(self.module, self.params, duals):
                    return map_scores(_tangent_of, probe())

        guard = refuse_unsupported(self.module, self.name, _INSTEAD, plain=probe, retry=dual)
        with torch.no_grad(), guard:
            moved = dual()
        return forward(), map_scores(lambda part: widen(part) * tangent.norm, moved)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Choose kernels that have a forward mode.

        Yields:
            Nothing.
        """
        has_recurrence = any(isinstance(part, nn.RNNBase) for part in self.module.modules())
        with ExitStack() as stack:
            stack.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            backends: Any = torch.backends
            for backend in (backends.mkldnn, backends.cudnn) if has_recurrence else ():
                # Their own `flags` would reset every other setting as well.
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
            yield


def _tangent_of(scores: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(scores).tangent
    return torch.zeros_like(scores) if tangent is None else tangent.clone()


_INSTEAD = "Pass engine='finite_difference' or engine='head'."
