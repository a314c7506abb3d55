"""The gradient of the validation loss, and the name of a submodule that a pass fails in."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from saflex_lightning.functional.losses import Scores, as_tuple, map_scores, widen

from .errors import UnsupportedModelError
from .untouched import extra_pass, untouched

__all__ = ["loss_gradient", "refuse_unsupported"]

_PEAKS = (10, 0, -10, -20)  # powers of two: largest cotangent of the scores, try after try


def loss_gradient(
    module: nn.Module,
    params: Sequence[Tensor],
    run: Callable[[], Scores],
    loss: Callable[[Scores], Tensor],
    *,
    engine: str,
) -> tuple[Tensor, ...]:
    """Return the gradient of the loss of the scores that ``run`` computes, one per parameter.

    The model runs in the mode it is in, in full precision. The loss sees scores of float32 or
    wider, and the result has that precision whatever the parameters have; the backward pass of a
    model with float16 parameters is scaled to their range.
    """
    narrow = any(parameter.dtype == torch.float16 for parameter in module.parameters())

    def compute() -> Sequence[Tensor]:
        with extra_pass(module), torch.enable_grad():
            scores = map_scores(widen, run())
            value = loss(scores)
            if narrow:
                return _rescaled_gradient(value, scores, params)
            return torch.autograd.grad(value, params, materialize_grads=True)

    def plain() -> Tensor:
        return loss(map_scores(widen, run()))

    with refuse_unsupported(module, engine, "Pass engine='head'.", plain=plain, retry=compute):
        return tuple(_widen_dense(part) for part in compute())


def _widen_dense(gradient: Tensor) -> Tensor:
    return widen(gradient.to_dense() if gradient.is_sparse else gradient)  # of `nn.Embedding`


def _rescaled_gradient(value: Tensor, scores: Scores, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a loss through layers in float16, without its narrow range.

    The mean loss of a batch moves each score by a fraction of 1 / batch, and what that becomes in
    earlier layers can vanish in float16. So the cotangent of the scores is scaled to a largest
    entry near 1,000, which the result undoes in float32. Where that overflows, the pass is
    repeated with a smaller one; where no scale fits, the result is not finite. Looking for an
    overflow waits for the device.
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


@contextmanager
def refuse_unsupported(
    module: nn.Module,
    engine: str,
    instead: str,
    *,
    plain: Callable[[], object],
    retry: Callable[[], object],
) -> Iterator[None]:
    """Turn a failure inside an engine's own pass into an error that names the submodule.

    A model that fails in the ``plain`` pass, without the engine, shows its own error, and so does
    a pass that works when a ``retry`` repeats it: a lack of memory, a worker that died meanwhile.
    """
    try:
        yield
    except Exception as error:
        no_memory = (torch.cuda.OutOfMemoryError, MemoryError)
        if isinstance(error, (UnsupportedModelError, *no_memory)):
            raise
        with untouched(module), torch.no_grad():
            plain()
        name = _failing_submodule(module, retry)
        if name is None:
            raise
        raise UnsupportedModelError(
            f"Expected every submodule to work with engine='{engine}', but {name} raised "
            f"{type(error).__name__}: {error} {instead}"
        ) from error


def _failing_submodule(module: nn.Module, retry: Callable[[], object]) -> str | None:
    entered: list[nn.Module] = []

    def enter(submodule: nn.Module, _args: object) -> None:
        entered.append(submodule)

    def leave(submodule: nn.Module, _args: object, _output: object) -> None:
        if entered and entered[-1] is submodule:
            entered.pop()

    names = {submodule: name for name, submodule in module.named_modules()}
    handles = [submodule.register_forward_pre_hook(enter) for submodule in names]
    handles += [submodule.register_forward_hook(leave) for submodule in names]
    try:
        retry()
        return None
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    culprit = entered[-1] if entered else module
    return f"submodule `{names.get(culprit) or 'the model itself'}` ({type(culprit).__name__})"
