"""The default engine: one more forward pass at slightly moved parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError, refuse_unsupported
from .gradient import loss_gradient
from .parameters import Scores, Tangent, map_scores, moved_parameters, unchanged_state
from .precision import exact_products, full_precision

__all__ = ["FiniteDifferenceEngine"]


class FiniteDifferenceEngine:
    r"""Measure :math:`Z \approx (f(\theta + \epsilon t) - f(\theta)) / \epsilon` from two forwards.

    The second point is the training forward itself, so the cost is one forward without a graph.
    The parameters move by a fixed Euclidean length, ``3 * sqrt(machine epsilon)`` of their dtype
    (0.001 in float32; ``README.md`` has the measurements behind it). Where the training forward
    rounds its products (autocast, TF32 convolutions on CUDA devices) both points are computed in
    full precision, which costs a second extra forward.

    Args:
        module: The model.
        params: Parameters that move.

    Raises:
        UnsupportedModelError: If a parameter has less than single precision.
    """

    name = "finite_difference"

    def __init__(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        self.module = module
        self.params = list(params)
        self._buffers: list[Tensor] | None = None
        dtypes = {parameter.dtype for parameter in self.params}
        if any(torch.finfo(dtype).bits < 32 for dtype in dtypes):
            raise UnsupportedModelError(
                "Expected parameters of float32 or wider for engine='finite_difference', but got "
                f"{sorted(map(str, dtypes))}: its small step would be rounded away. {_INSTEAD}"
            )

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
            probe: What the extra pass runs instead of ``forward``; same rows or those in ``rows``.
            rows: Rows of the batch that ``probe`` computes, int64; None means all.

        Returns:
            The scores with their graph, and the detached tangent of the probed rows.
        """
        probe = probe or forward
        step = 3 * torch.finfo(self.params[0].dtype).eps ** 0.5
        if self._buffers is None and self.params[0].device.type == "cpu":
            # Fresh memory costs a CPU more than the addition that fills it, and a GPU nothing.
            self._buffers = [torch.empty_like(parameter) for parameter in self.params]

        def point() -> tuple[Scores, bool]:
            """Return the scores at the parameters as they are, and whether that was exact."""
            with (
                unchanged_state(self.module),
                full_precision(self.params) as ignored,
                exact_products(self.params[0].device.type) as switched,
            ):
                return probe(), not (ignored or switched)

        def moved_point() -> tuple[Scores, bool]:
            with moved_parameters(self.params, tangent.direction, step, self._buffers):
                return point()

        guard = refuse_unsupported(self.module, self.name, _INSTEAD, plain=probe, retry=moved_point)
        with torch.no_grad(), guard:
            ahead, is_exact = moved_point()
            here = None if is_exact else point()[0]
        scores = forward()
        if here is None:
            here = map_scores(lambda s: s.detach() if rows is None else s.detach()[rows], scores)
        scale = tangent.norm / step
        return scores, map_scores(lambda there, base: (there - base) * scale, ahead, here)


_INSTEAD = "Pass engine='forward_mode' or engine='head'."
