"""What a checkpoint keeps of a run: whether it can be read, and whether it is the same run's."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = ["STATE_VERSION", "changed_settings", "check_gradient", "check_state"]

STATE_VERSION = 2

_KINDS: dict[str, tuple[type, ...]] = {
    "settings": (dict,),
    "seed": (int, type(None)),
    "batch_size": (int, type(None)),
    "batches": (int,),
    "draws": (int,),
    "options": (tuple,),
    "gradient": (dict,),
    "num_classes": (int,),
    "parameters": (tuple,),
    "gathered": (dict,),
    "skipped_steps": (int,),
}
_GATHERED_KINDS: dict[str, tuple[type, ...]] = {
    "bank": (dict, type(None)),
    "gates": (dict, type(None)),
    "pool": (dict, type(None)),
}
_GRADIENT_KINDS: dict[str, tuple[type, ...]] = {
    "refreshed": (int, type(None)),
    "average": (tuple, type(None)),
    "direction": (tuple, type(None)),
    "length": (Tensor, type(None)),
    "started": (Tensor, type(None)),
    "finite": (Tensor, type(None)),
    "norm": (Tensor, type(None)),
}


def check_state(state: Any) -> None:
    """Check that the state of a callback is whole and of this version.

    Args:
        state: What a checkpoint holds under the callback's key.

    Raises:
        MisconfigurationException: If it is of another version, or an entry is missing or of
            another type; the message lists all of them.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise MisconfigurationException(
            f"Expected callback state of version {STATE_VERSION}, but the checkpoint holds "
            f"version {version!r}. Resume with the library version that wrote it, or start a new "
            "run."
        )
    problems = list(_problems(state, _KINDS, ""))
    if not problems:
        problems += _problems(state["gradient"], _GRADIENT_KINDS, "gradient.")
        problems += _problems(state["gathered"], _GATHERED_KINDS, "gathered.")
    if not problems:
        problems += _partial(state["gradient"])
    if problems:
        raise MisconfigurationException(
            "Expected the whole state of `SAflexCallback` in the checkpoint, but "
            + ", ".join(problems)
            + ". The file is damaged or was edited; resume from another checkpoint."
        )


def check_gradient(gradient: Mapping[str, Any], names: tuple[str, ...], module: nn.Module) -> None:
    """Check that a saved validation gradient fits the parameters of the module.

    Args:
        gradient: What `ValidationGradient.state_dict` returned.
        names: Name of the parameter that each part of it belongs to.
        module: The module.

    Raises:
        MisconfigurationException: If a part has no parameter of its shape; the message lists all
            of them.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    problems: list[str] = []
    for kind in ("average", "direction"):
        parts = gradient[kind] or ()
        if len(parts) != len(names if parts else ()):
            problems.append(f"`{kind}` has {len(parts)} parts for {len(names)} parameters")
            continue
        problems += [
            f"`{kind}` has shape {tuple(part.shape)} for `{name}`, which "
            + (f"has {shapes[name]}" if name in shapes else "the module does not have")
            for name, part in zip(names, parts, strict=False)
            if shapes.get(name) != tuple(part.shape)
        ]
    if problems:
        raise MisconfigurationException(
            "Expected the saved validation gradient to fit the parameters of the module, but "
            + ", ".join(problems)
            + ". Resume with the module that wrote the checkpoint."
        )


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ.

    Args:
        saved: Settings of the run that wrote a checkpoint.
        current: Settings of the run that reads it.

    Returns:
        Names in alphabetical order; one that only one of the two has is among them.
    """
    missing = object()
    return sorted(
        name
        for name in {*saved, *current}
        if saved.get(name, missing) != current.get(name, missing)
    )


def _problems(
    state: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], prefix: str
) -> Iterator[str]:
    for name, allowed in kinds.items():
        if name not in state:
            yield f"`{prefix}{name}` is missing"
        elif not isinstance(state[name], allowed):
            wanted = " or ".join(
                "None" if kind is type(None) else kind.__name__ for kind in allowed
            )
            yield f"`{prefix}{name}` is a {type(state[name]).__name__}, not a {wanted}"


def _partial(gradient: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong between entries that are right by themselves."""
    absent = [name for name in _GRADIENT_KINDS if gradient[name] is None]
    if absent and len(absent) < len(_GRADIENT_KINDS):
        yield f"of `gradient` only {absent} are None"
    for name in ("average", "direction"):
        if not all(isinstance(part, Tensor) for part in gradient[name] or ()):
            yield f"`gradient.{name}` holds something else than tensors"
