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
        ascent = [part.clone() for part in gradient]
    else:
        size = sum(moment.numel() for moment in second_moments)
        total = torch.stack([moment.sum() for moment in second_moments]).sum()
        damping = torch.where(total > 0, _DAMPING * (total / size).sqrt(), 1)
        roots = [moment.sqrt().add_(damping) for moment in second_moments]
        ascent = [
            torch.div(part, root, out=root) for part, root in zip(gradient, roots, strict=True)
        ]
    norm = torch.linalg.vector_norm(torch.stack([_wide_norm(part) for part in ascent]))
    descent = -torch.where(norm > 0, norm, 1)
    return Tangent(tuple(part.div_(descent) for part in ascent), norm)


def _wide_norm(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))


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
    wanted, moments = set(params), dict[Tensor, Tensor]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in wanted.intersection(group["params"]):
                state: Mapping[str, Any] = optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state and "betas" in group:
                    correction = 1 - group["betas"][1] ** state["step"]
                    moments[parameter] = _whole(widen(state["exp_avg_sq"])) / correction
    matched = [moments.get(parameter) for parameter in params]
    if all(moment is None for moment in matched):
        return None
    return [
        _whole(widen(torch.zeros_like(parameter))) if moment is None else moment
        for parameter, moment in zip(params, matched, strict=True)
    ]


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
    with torch.no_grad():
        saved = [tensor.detach().clone() for tensor in tensors]
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
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)


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
            for place, (parameter, value) in enumerate(zip(params, values, strict=True)):
                moved = None if buffers is None else buffers[place]
                parameter.data = torch.add(value, direction[place], alpha=length, out=moved)
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
