"""Parameters that are matched: which they are, and how they are moved or replaced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .untouched import delayed_signals

__all__ = ["moved_parameters", "replaced_parameters", "select_parameters"]


def select_parameters(
    module: nn.Module, patterns: Sequence[str] | None = None, held: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return the trainable parameters that name patterns choose, in the module's order, each once.

    Without patterns these are the ones that are ``held`` by an optimizer, where any is: the others
    do not move.

    Raises:
        ValueError: If a pattern matches no trainable parameter, or none is trainable.
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
        kept = set(held or ())
        return [p for p in trainable.values() if p in kept] or list(trainable.values())
    return [
        parameter
        for name, parameter in trainable.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


@contextmanager
def moved_parameters(
    params: Sequence[Tensor], direction: Sequence[Tensor], length: float
) -> Iterator[None]:
    """Let parameters hold ``parameter + length * direction`` for the block.

    Only the storage behind each parameter is exchanged: the original values are never written, so
    nothing can leave them half moved, and graphs that were recorded before stay valid. Every
    reference to the parameter itself sees the move; a view of its storage made earlier does not.
    Signals wait.
    """
    values = [parameter.data for parameter in params]
    with delayed_signals():
        try:
            for parameter, value, part in zip(params, values, direction, strict=True):
                parameter.data = value.add(part, alpha=length)
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
