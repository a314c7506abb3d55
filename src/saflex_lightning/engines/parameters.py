"""Parameters as a point and a direction: selection, tangent, state that must not change."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saflex_lightning.functional import widen

from .signals import delayed_signals

__all__ = [
    "Scores",
    "Tangent",
    "adam_second_moments",
    "make_tangent",
    "map_scores",
    "moved_parameters",
    "replaced_parameters",
    "select_parameters",
    "unchanged_generators",
    "unchanged_state",
]

Scores = Tensor | tuple[Tensor, ...]

_DAMPING = 0.1  # of the root mean square of sqrt(v); Adam's own 1e-8 lets dead units dominate


class Tangent(NamedTuple):
    """A direction in parameter space, kept as a unit vector and its length.

    Attributes:
        direction: One tensor per matched parameter; together of norm 1, or all 0.
        norm: Length of the direction before scaling, scalar.
    """

    direction: tuple[Tensor, ...]
    norm: Tensor


def select_parameters(module: nn.Module, patterns: Sequence[str] | None = None) -> list[Tensor]:
    """Return the trainable parameters that the solve matches, each once.

    Args:
        module: The model.
        patterns: Shell-style name patterns such as ``"head.*"``; None takes every trainable one.

    Returns:
        Parameters in the module's order; tied ones appear once.

    Raises:
        ValueError: If a pattern matches no trainable parameter or none is trainable.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"Expected every pattern in `params` to match a trainable parameter, but "
                f"{pattern!r} matches none of {sorted(trainable)}. Correct the pattern."
            )
    if not trainable:
        raise ValueError(
            "Expected a model with trainable parameters, but none requires a gradient. "
            "Unfreeze some before fitting."
        )
    if patterns is None:
        return list(trainable.values())
    return [
        parameter
        for name, parameter in trainable.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def make_tangent(
    gradient: Sequence[Tensor], second_moments: Sequence[Tensor] | None = None
) -> Tangent:
    r"""Return the direction in which the validation loss falls: the one owner of Pi's sign.

    .. math:: t = -g \quad\text{or}\quad t = -g / (\sqrt{\hat v} + \epsilon)

    with epsilon a tenth of the root mean square of all entries of :math:`\sqrt{\hat v}` (1 where
    all of v is 0). Scores that grow along t are scores whose growth lowers the validation loss.

    Args:
        gradient: g, one tensor per matched parameter.
        second_moments: Adam's bias-corrected v, one tensor per parameter; None means no
            preconditioning.

    Returns:
        The tangent as a unit vector and its length.

    References:
        Ding et al. 2024, Eq. 8 and 9, with the minus that the paper leaves out.
    """
    if second_moments is None:
        ascent = torch._foreach_mul(gradient, 1)
    else:
        roots = torch._foreach_sqrt(second_moments)
        size = sum(root.numel() for root in roots)
        rms = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(roots))) / size**0.5
        torch._foreach_add_(roots, torch.where(rms > 0, _DAMPING * rms, 1))
        ascent = [
            torch.div(part, root, out=root) for part, root in zip(gradient, roots, strict=True)
        ]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ascent)))
    torch._foreach_div_(ascent, -torch.where(norm > 0, norm, 1))
    return Tangent(tuple(ascent), norm)


def adam_second_moments(
    params: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> list[Tensor] | None:
    r"""Return Adam's bias-corrected second moments :math:`\hat v = v / (1 - \beta_2^t)`.

    Args:
        params: Parameters, in the order wanted.
        optimizers: Optimizers that may hold them; moments sharded over ranks are gathered.

    Returns:
        One tensor per parameter in float32 or wider, zeros where an optimizer has not stepped it
        yet; None before the first step of an Adam-like optimizer, or when none is Adam-like.
    """
    wanted, moments, corrections = set(params), dict[Tensor, Tensor](), dict[Tensor, float]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in wanted.intersection(group["params"]):
                state: Mapping[str, Any] = optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state and "betas" in group:
                    moment = _whole(widen(state["exp_avg_sq"]))
                    correction = 1 - group["betas"][1] ** state["step"]
                    if isinstance(correction, Tensor) and correction.device.type != "cpu":
                        moment, correction = moment / correction, 1.0  # waits for no device
                    moments[parameter], corrections[parameter] = moment, float(correction)
    if not moments:
        return None
    for parameter in wanted - moments.keys():
        moments[parameter], corrections[parameter] = _whole(widen(torch.zeros_like(parameter))), 1.0
    return list(torch._foreach_div([moments[p] for p in params], [corrections[p] for p in params]))


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from its ranks; any other is returned as it is."""
    gather = getattr(tensor, "full_tensor", None)  # of `DTensor`
    return tensor if gather is None else gather()


def map_scores(function: Callable[..., Tensor], *scores: Scores) -> Scores:
    """Apply a function to a score tensor, or to each task of a tuple of them.

    Args:
        function: Takes one tensor from each argument.
        *scores: Tensors, or tuples of equal length.

    Returns:
        A tensor, or a tuple of them.
    """
    if isinstance(scores[0], Tensor):
        return function(*scores)
    return tuple(function(*tasks) for tasks in zip(*scores, strict=True))


@contextmanager
def unchanged_state(module: nn.Module) -> Iterator[None]:
    """Restore every bit of a module and of the random state on every exit.

    Covers buffers (their values, and the tensor objects themselves), training modes, and the
    random state of torch (CPU and the model's devices), NumPy and Python. Signals wait.

    Args:
        module: The module whose state is kept.

    Yields:
        Nothing.
    """
    parts = list(module.modules())
    kept = [(part, part.training, dict(part._buffers)) for part in parts]
    tensors = [b for _, _, slots in kept for b in slots.values() if b is not None]
    saved = [torch.empty_like(tensor) for tensor in tensors]
    _copy_all(saved, tensors)
    params = [p for part in parts for p in part._parameters.values()]
    with delayed_signals(), unchanged_generators(params):
        try:
            yield
        finally:
            for part, mode, slots in kept:
                if part.training != mode:  # an assignment to a module is slow
                    part.training = mode
                part._buffers.clear()
                part._buffers.update(slots)
            _copy_all(tensors, saved)


@torch.no_grad()
def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors in a few launches: as many as there are kinds of them."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        pair = kinds.setdefault((target.dtype, target.device), ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for same_targets, same_sources in kinds.values():
        torch._foreach_copy_(same_targets, same_sources)


@contextmanager
def unchanged_generators(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Restore the random state of torch, NumPy and Python on every exit.

    Args:
        tensors: Tensors whose CUDA devices are covered beside the CPU; None is passed over.

    Yields:
        Nothing.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def moved_parameters(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    length: float,
    buffers: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Let parameters hold ``parameter + length * direction`` for the block.

    Only the storage behind each parameter is exchanged: the original values are never written, so
    nothing can leave them half moved, and graphs that were recorded before stay valid. Every
    reference to the parameter itself sees the move; a view of its storage made earlier does not.
    Signals wait.

    Args:
        params: Parameters, each once.
        direction: One tensor per parameter.
        length: How far to move along the direction.
        buffers: Where to put the moved values, one tensor per parameter; None allocates them.

    Yields:
        Nothing.
    """
    values = [parameter.data for parameter in params]
    with delayed_signals():
        try:
            if buffers is None:
                buffers = torch._foreach_add(values, direction, alpha=length)
            else:
                for value, part, buffer in zip(values, direction, buffers, strict=True):
                    torch.add(value, part, alpha=length, out=buffer)
            for parameter, moved in zip(params, buffers, strict=True):
                parameter.data = moved
            yield
        finally:
            for parameter, value in zip(params, values, strict=True):
                parameter.data = value


@contextmanager
def replaced_parameters(
    module: nn.Module, params: Sequence[Tensor], replacements: Sequence[Tensor]
) -> Iterator[None]:
    """Put other tensors in the place of parameters, wherever the module refers to them.

    Slots are found by identity, so tied weights, aliased submodules and the flat weight lists of
    recurrent layers all see the replacement; every slot gets its own object back. Signals wait.

    Args:
        module: The module.
        params: Parameters to replace.
        replacements: One tensor per parameter.

    Yields:
        Nothing.
    """
    table = {id(parameter): new for parameter, new in zip(params, replacements, strict=True)}
    slots: list[tuple[Any, Any, Any]] = []
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if id(parameter) in table:
                slots.append((submodule._parameters, name, parameter))
        flat: Any = submodule.__dict__.get("_flat_weights", [])
        slots += [(flat, place, p) for place, p in enumerate(flat) if id(p) in table]
    with delayed_signals():
        try:
            for container, key, parameter in slots:
                container[key] = table[id(parameter)]
            yield
        finally:
            for container, key, parameter in slots:
                container[key] = parameter
