"""The engine for models without a forward mode: one more forward pass at moved parameters."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saflex_lightning.functional.losses import Scores, as_tuple, map_scores
from saflex_lightning.functional.ranks import Ranks

from .direction import Direction, joint_norm
from .engine import Finish
from .errors import UnsupportedModelError
from .gradient import loss_gradient, refuse_unsupported
from .parameters import moved_parameters
from .untouched import extra_pass, untouched

__all__ = ["FiniteDifferenceEngine"]

_INSTEAD = "Pass engine='forward_mode' or engine='head'."
_REPEATED = 1e-5  # of the scores' spread: rounding lies below, other random draws far above
_AGREED = 0.3  # of the derivative: the error of a step lies below, that of a surrogate above
_NOISE = 100  # units of rounding of the scores that a difference cannot tell from a derivative


class FiniteDifferenceEngine:
    r"""Measure :math:`Z \approx (f(\theta + \epsilon t) - f(\theta)) / \epsilon` from two forwards.

    The second point is the training forward itself, so the cost is one forward without a graph.
    The parameters move by a fixed Euclidean length, ``3 * sqrt(machine epsilon)`` of their coarsest
    dtype (0.001 in float32). Parameters in half precision, autocast and TF32 are refused: the
    difference would drown in rounding.

    Before its first use the engine looks whether a pass repeats itself, and whether the backward
    pass of the model is its derivative: straight-through estimators, fake quantisation and gradient
    reversal have another one, which a difference of values cannot see.
    """

    name = "finite_difference"
    repeats_forward = True

    def __init__(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        self.module = module
        self.params = list(params)
        self._is_checked = False
        self._ranks = Ranks.current()
        dtypes = {parameter.dtype for parameter in self.params}
        if any(torch.finfo(dtype).bits < 32 for dtype in dtypes):
            raise UnsupportedModelError(
                "Expected parameters of float32 or wider for engine='finite_difference', but got "
                f"{sorted(map(str, dtypes))}: its small step would be rounded away. {_INSTEAD}"
            )
        self._step = 3 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5

    def gradient(
        self, run: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the loss; see `loss_gradient`."""
        return loss_gradient(self.module, self.params, run, loss, engine=self.name)

    def jvp(self, run: Callable[[], Scores], direction: Direction) -> Finish:
        """Run the forward at moved parameters; the other point is the training forward to come.

        Raises:
            UnsupportedModelError: If a pass does not repeat itself, products are rounded, or the
                model's backward pass is not its derivative.
        """

        def ahead() -> Scores:
            with moved_parameters(self.params, direction.parts, self._step):
                return self._pass(run)

        guard = refuse_unsupported(self.module, self.name, _INSTEAD, plain=run, retry=ahead)
        with torch.no_grad(), guard:
            if not self._is_checked:
                self._check(run)
            moved = ahead()
        scale = direction.norm / self._step
        return Finish(
            lambda scores: map_scores(lambda a, b: (a - b.detach()) * scale, moved, scores)
        )

    def _pass(self, run: Callable[[], Scores], *, graph: bool = False) -> Scores:
        device_type = self.params[0].device.type
        with untouched(self.module), torch.set_grad_enabled(graph):
            single = any(parameter.dtype == torch.float32 for parameter in self.params)
            if single and (rounded := _rounded_products(device_type)):
                raise UnsupportedModelError(
                    "Expected exact float32 products for engine='finite_difference', but "
                    f"{rounded} rounds them, and a difference of two nearby points drowns in that. "
                    f"{_INSTEAD}"
                )
            with extra_pass(self.module) as ignored:
                scores = run()
            if ignored:
                raise UnsupportedModelError(
                    "Expected a forward in float32 or wider for engine='finite_difference', but "
                    f"{ignored[0]} rounds it, and a difference of two nearby points drowns in that."
                    f" {_INSTEAD}"
                )
            return scores if graph else map_scores(Tensor.detach, scores)

    def _check(self, run: Callable[[], Scores]) -> None:
        """Compare two passes with one another, and differences with a backward pass."""
        with_graph, without = self._pass(run, graph=True), self._pass(run)
        spread, error = _compare(as_tuple(with_graph), as_tuple(without))
        ready = 0 < spread < math.inf and error < math.inf
        count = self._ranks.sum(torch.tensor(int(ready), device=self.params[0].device))
        if int(count) < self._ranks.size:  # no rows, a head that starts at zero, not finite numbers
            return  # next time
        if error > _REPEATED * spread:
            raise UnsupportedModelError(
                "Expected a forward to repeat itself under the same random state for "
                f"engine='finite_difference', but its scores differ by {error / spread:.2g} of "
                "their spread. Draw random numbers from torch's global generator, or pass "
                "engine='head'."
            )
        self._is_checked = True
        if name := self._find_surrogate(run, with_graph):
            raise UnsupportedModelError(
                "Expected a backward pass that is the derivative of the forward pass for "
                f"engine='finite_difference', but at the parameters of submodule `{name}` it is "
                "not, as with straight-through estimators, fake quantisation or gradient reversal. "
                f"{_INSTEAD}"
            )

    def _find_surrogate(self, run: Callable[[], Scores], scores: Scores) -> str | None:
        r"""Return the last submodule, in the model's order, whose backward pass is no derivative.

        For a random cotangent u, t is the part of :math:`J^\top u` that belongs to some parameters,
        scaled to length 1; then :math:`\langle u, J t \rangle` is the length it had. That takes two
        passes for each submodule with parameters, once in a fit. Scores of features that were
        gathered from other ranks depend on the parameters there: ranks move alike.
        """
        generator = torch.Generator().manual_seed(0)
        tasks = as_tuple(scores)
        cotangents = [torch.randn(task.shape, generator=generator).to(task) for task in tasks]
        params = [p for p in self.params if p.requires_grad]  # `toggle_optimizer` freezes some
        found = torch.autograd.grad(tasks, params, cotangents, materialize_grads=True)
        parts = self._ranks.mean([part.to_dense() for part in found])
        slopes = {id(p): part for p, part in zip(params, parts, strict=True)}
        (size,) = self._ranks.mean([joint_norm([task.detach() for task in tasks])])
        noise = _NOISE * torch.finfo(size.dtype).eps / self._step * float(size)

        def differs(params: Sequence[Tensor]) -> bool:
            along = [slopes[id(p)] for p in params]
            expected = joint_norm(along)
            ends = []
            for step in (self._step, -self._step):
                direction = [part / expected.clamp(min=1e-30) for part in along]
                with moved_parameters(params, direction, step):
                    ends.append(as_tuple(self._pass(run)))
            moved = [(u * (a - b)).sum() for u, a, b in zip(cotangents, *ends, strict=True)]
            (found,) = self._ranks.mean([torch.stack(moved).sum() / (2 * self._step)])
            error = abs(float(found) - float(expected))
            return error > _AGREED * max(abs(float(found)), float(expected)) + noise

        owned = [
            (name, own)
            for name, part in self.module.named_modules()
            if (own := [p for p in part.parameters(recurse=False) if id(p) in slopes])
        ]
        return next((name for name, own in reversed(owned) if differs(own)), None)


def _compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """Return the spread of scores, 0 without rows, and how far two passes are apart."""
    tasks = [scores.detach() for scores in first]
    if not all(scores.numel() for scores in tasks):
        return 0.0, 0.0
    spread = torch.stack([scores.std(correction=0) for scores in tasks]).min()
    errors = [(a - b).abs().max() for a, b in zip(tasks, second, strict=True)]
    return spread.item(), torch.stack(errors).max().item()


def _rounded_products(device_type: str) -> str | None:
    """Return the name of a switch that lets float32 products be rounded to TF32 or bfloat16."""
    for name, read in _switches(device_type):
        try:
            value = read()
        except (AttributeError, RuntimeError):
            continue  # torch has two interfaces; it refuses to read the one not in use
        if value in {True, "high", "medium", "tf32", "bf16"}:
            return name
    return None


def _switches(device_type: str) -> Iterator[tuple[str, Callable[[], object]]]:
    backends: Any = torch.backends
    if device_type == "cuda":
        yield "torch.backends.cudnn.allow_tf32", lambda: backends.cudnn.allow_tf32
        yield "torch.backends.cuda.matmul.allow_tf32", lambda: backends.cuda.matmul.allow_tf32
    for backend in {"cuda": ("cuda", "cudnn"), "cpu": ("mkldnn",)}.get(device_type, ()):
        for product in ("matmul", "conv", "rnn"):
            yield (
                f"torch.backends.{backend}.{product}.fp32_precision",
                lambda backend=backend, product=product: (
                    getattr(getattr(backends, backend), product).fp32_precision
                ),
            )
    yield "torch.set_float32_matmul_precision", torch.get_float32_matmul_precision
