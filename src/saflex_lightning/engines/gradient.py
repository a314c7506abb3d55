"""The validation pass in evaluation mode, and the gradient by backward differentiation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saflex_lightning.functional import widen

from .errors import refuse_unsupported
from .parameters import Scores, as_tuple, map_scores
from .precision import full_precision
from .unchanged import unchanged_state

__all__ = ["evaluate", "loss_gradient"]

_PEAKS = (10, 0, -10, -20)  # powers of two: largest cotangent of the scores, try after try


def loss_gradient(
    module: nn.Module,
    params: Sequence[Tensor],
    forward: Callable[[], Scores],
    loss: Callable[[Scores], Tensor],
    *,
    engine: str,
) -> tuple[Tensor, ...]:
    """Return the gradient of a loss with the model in evaluation mode.

    Running statistics are used instead of batch statistics and dropout is off; the module's modes,
    buffers, ``.grad`` and the random state are as before afterwards. The loss sees scores of
    float32 or wider, and the result has that precision whatever the parameters have. The backward
    pass of a model with float16 parameters is scaled to their range.

    Args:
        module: The model.
        params: Parameters to differentiate with respect to.
        forward: Computes the scores of a validation batch.
        loss: Computes the mean loss of the scores, scalar.
        engine: Name of the engine that asks, for its error.

    Returns:
        One tensor per parameter; zeros where the loss does not depend on it.
    """
    narrow = any(parameter.dtype == torch.float16 for parameter in module.parameters())

    def compute() -> Sequence[Tensor]:
        with unchanged_state(module), full_precision(params), torch.enable_grad():
            _evaluate_mode(module)
            scores = map_scores(widen, forward())
            value = loss(scores)
            if narrow:
                return _rescaled_gradient(value, scores, params)
            return torch.autograd.grad(value, params, materialize_grads=True)

    def plain() -> Tensor:
        _evaluate_mode(module)
        return loss(map_scores(widen, forward()))

    with refuse_unsupported(module, engine, "Pass engine='head'.", plain=plain, retry=compute):
        return tuple(_widen_dense(part) for part in compute())


def evaluate(module: nn.Module, forward: Callable[[], Scores]) -> Scores:
    """Return scores with the model in evaluation mode, without a graph and in full precision.

    Args:
        module: The model; it is as before afterwards.
        forward: Computes the scores.

    Returns:
        The scores.
    """
    params = list(module.parameters())
    with unchanged_state(module), full_precision(params), torch.no_grad():
        _evaluate_mode(module)
        return forward()


def _evaluate_mode(module: nn.Module) -> None:
    # Without `eval()`, which some models override to change parameters, as LoRA merges its own.
    for part in module.modules():
        if part.training:
            part.training = False


def _widen_dense(gradient: Tensor) -> Tensor:
    return widen(gradient.to_dense() if gradient.is_sparse else gradient)  # of `nn.Embedding`


def _rescaled_gradient(value: Tensor, scores: Scores, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a loss through layers in float16, without its narrow range.

    The mean loss of a batch moves each score by a fraction of 1 / batch, and what that becomes in
    earlier layers can vanish in float16. So the cotangent of the scores is scaled to a largest
    entry near 1,000, which the result undoes in float32. Where that overflows, the pass is
    repeated with a smaller one. Looking for an overflow waits for the device.

    Args:
        value: The loss, scalar.
        scores: What it was computed from, float32.
        params: Parameters to differentiate with respect to.

    Returns:
        One tensor per parameter, float32; not finite where no scale fits.
    """
    tasks = as_tuple(scores)
    cotangents = torch.autograd.grad(value, tasks, retain_graph=True, materialize_grads=True)
    peak = torch.stack([part.abs().amax() for part in cotangents]).amax()
    gradients: list[Tensor] = []
    for wanted in _PEAKS:
        exponent = torch.frexp(peak).exponent - wanted  # powers of two scale without rounding
        parts = torch.autograd.grad(
            tasks,
            params,
            [torch.ldexp(part, -exponent) for part in cotangents],
            retain_graph=True,
            materialize_grads=True,
        )
        gradients = [torch.ldexp(_widen_dense(part), exponent) for part in parts]
        if torch.stack([part.isfinite().all() for part in gradients]).all():
            break
    return gradients
