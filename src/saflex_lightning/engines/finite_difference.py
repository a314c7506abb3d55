"""The default engine: one more forward pass at slightly moved parameters."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError, refuse_unsupported
from .gradient import loss_gradient
from .parameters import Scores, as_tuple, map_scores, moved_parameters
from .precision import exact_products, full_precision
from .tangent import Tangent
from .unchanged import unchanged_state

__all__ = ["FiniteDifferenceEngine"]


class FiniteDifferenceEngine:
    r"""Measure :math:`Z \approx (f(\theta + \epsilon t) - f(\theta)) / \epsilon` from two forwards.

    The second point is the training forward itself, so the cost is one forward without a graph.
    The parameters move by a fixed Euclidean length, ``3 * sqrt(machine epsilon)`` of their coarsest
    dtype (0.001 in float32; ``README.md`` has the measurements behind it). Where the training
    forward rounds its products (autocast, TF32 convolutions on CUDA devices) both points are
    computed in full precision, which costs a second extra forward.

    The first call also compares an extra pass at unmoved parameters with the training forward:
    dropout that is compiled draws other numbers without a graph than with one, and the
    difference of two masks is no derivative. Where they differ, extra passes keep a graph from
    then on. Where the training forward rounds, two extra passes are compared instead.

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
        self._with_graph = False  # whether extra passes need one
        self._repeats: bool | None = None  # whether extra passes repeat the training forward
        self._repeat_each_other = False  # whether that was seen of two extra passes
        dtypes = {parameter.dtype for parameter in self.params}
        if any(torch.finfo(dtype).bits < 32 for dtype in dtypes):
            raise UnsupportedModelError(
                "Expected parameters of float32 or wider for engine='finite_difference', but got "
                f"{sorted(map(str, dtypes))}: its small step would be rounded away. {_INSTEAD}"
            )
        self._step = 3 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5

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

        Raises:
            UnsupportedModelError: If an extra pass cannot repeat the training forward.
        """
        probe = probe or forward
        if self._buffers is None and self.params[0].device.type == "cpu":
            # Fresh memory costs a CPU more than the addition that fills it, and a GPU nothing.
            self._buffers = [torch.empty_like(parameter) for parameter in self.params]

        def point() -> tuple[Scores, bool]:
            """Return the scores at the parameters as they are, and whether that was exact."""
            with (
                unchanged_state(self.module),
                full_precision(self.params) as ignored,
                exact_products(self.params[0].device.type) as switched,
                torch.set_grad_enabled(self._with_graph),
            ):
                return map_scores(Tensor.detach, probe()), not (ignored or switched)

        def moved_point() -> tuple[Scores, bool]:
            with moved_parameters(self.params, tangent.direction, self._step, self._buffers):
                return point()

        guard = refuse_unsupported(self.module, self.name, _INSTEAD, plain=probe, retry=moved_point)
        with torch.no_grad(), guard:
            ahead, is_exact = moved_point()
            here = None if is_exact and self._repeats else point()[0]
            again = None if is_exact or self._repeat_each_other else point()[0]
        scores = forward()
        base = map_scores(lambda s: s.detach() if rows is None else s.detach()[rows], scores)
        if here is None:
            here = base
        elif again is not None:
            error = _relative_error(here, again)
            self._repeat_each_other = error is not None
            if error is not None and error > _DIFFERENT:
                raise UnsupportedModelError(_NO_REPEAT.format(error))
        elif is_exact and self._repeats is None:
            self._repeats = self._check_repeats(here, base)
        scale = tangent.norm / self._step
        return scores, map_scores(lambda there, start: (there - start) * scale, ahead, here)

    def _check_repeats(self, extra: Scores, training: Scores) -> bool | None:
        """Compare the scores of an extra pass with those of the training forward; waits for them.

        Args:
            extra: Scores at unmoved parameters.
            training: What they should be.

        Returns:
            True if they are equal; False if rounding alone parts them, so that both points should
            come from extra passes; None if only another call can tell.

        Raises:
            UnsupportedModelError: If they differ although the extra pass kept a graph.
        """
        error = _relative_error(extra, training)
        if error is None:
            return None
        if error <= _EQUAL:
            return True
        if not self._with_graph:
            self._with_graph = True
            return None
        if error > _DIFFERENT:
            raise UnsupportedModelError(_NO_REPEAT.format(error))
        return False


def _relative_error(extra: Scores, expected: Scores) -> float | None:
    """Return the largest difference of two passes over the spread of the scores, if it tells."""
    tasks, repeats = as_tuple(expected), as_tuple(extra)
    spread = torch.stack([scores.std(correction=0) for scores in tasks]).min().item()
    errors = [(a - b).abs().max() for a, b in zip(tasks, repeats, strict=True)]
    error = torch.stack(errors).max().item()
    if not (0 < spread < math.inf and error < math.inf):
        return None  # a head that starts at zero, or scores that are not finite
    return error / spread


_EQUAL, _DIFFERENT = 1e-5, 1e-2  # of the scores' spread: rounding below, other draws above
_NO_REPEAT = (
    "Expected a forward to repeat itself under the same random state for "
    "engine='finite_difference', but its scores differ by {:.2g} of their spread. Draw random "
    "numbers from torch's global generator, or pass engine='head'."
)
_INSTEAD = "Pass engine='forward_mode' or engine='head'."
