"""Parameters that the solve matches: which they are, and how they are moved or replaced."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import foreach
from .signals import delayed_signals

__all__ = [
    "Scores",
    "map_scores",
    "moved_parameters",
    "replaced_parameters",
    "select_parameters",
]

Scores = Tensor | tuple[Tensor, ...]


def select_parameters(module: nn.Module, patterns: Sequence[str] | None = None) -> list[Tensor]:
    """Return the trainable parameters that the solve matches, each once.

    Args:
        module: The model.
        patterns: Shell-style name patterns such as ``"head.*"``; None takes every trainable one.

    Returns:
        Parameters in the module's order; tied ones appear once.

    Raises:
        ValueError: If ``patterns`` is empty, one of them matches no trainable parameter, or no
            parameter is trainable.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if patterns is not None and not patterns:
        raise ValueError(
            "Expected `params` to hold at least one name pattern, but it is empty. Pass None to "
            "match every trainable parameter."
        )
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


def as_tuple(scores: Scores) -> tuple[Tensor, ...]:
    """Return scores as a tuple of tasks.

    Args:
        scores: A tensor, or a tuple of them.

    Returns:
        A tuple.
    """
    return (scores,) if isinstance(scores, Tensor) else tuple(scores)


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
                places = foreach.add(values, direction, alpha=length)
            else:
                places = buffers
                for value, part, place in zip(values, direction, places, strict=True):
                    torch.add(value, part, alpha=length, out=place)
            for parameter, place in zip(params, places, strict=True):
                parameter.data = place
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
