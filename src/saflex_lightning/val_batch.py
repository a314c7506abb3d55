"""What a validation batch holds, and how the module scores it."""

from typing import Any, Protocol

from torch import Tensor

from .engines import Scores

__all__ = ["HasScores", "call_scores", "read_batch"]

_INPUT_NAMES = ("inputs", "x", "image")
_TARGET_NAMES = ("target", "y", "label")


class HasScores(Protocol):
    """A module with the one function from inputs to logits."""

    def saflex_scores(self, *inputs: Any, **kwargs: Any) -> Scores:
        """Return the logits of some inputs."""
        ...


def call_scores(module: HasScores, inputs: Any) -> Scores:
    """Return the scores of a validation batch's inputs.

    Args:
        module: The module.
        inputs: A tuple is splatted, a dict passed as keywords, anything else is the one argument.

    Returns:
        What `SAflexMixin.saflex_scores` returns.
    """
    if isinstance(inputs, dict):
        return module.saflex_scores(**inputs)
    if isinstance(inputs, tuple):
        return module.saflex_scores(*inputs)
    return module.saflex_scores(inputs)


def read_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the inputs and target fields of a batch.

    Args:
        batch: A tuple, list, dict, named tuple or dataclass; see `SAflexMixin.saflex_val_batch`.

    Returns:
        Inputs and target.

    Raises:
        TypeError: If the batch has no such fields.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    fields = batch if isinstance(batch, dict) else getattr(batch, "__dict__", {})
    inputs = [name for name in _INPUT_NAMES if name in fields]
    targets = [name for name in _TARGET_NAMES if name in fields]
    if not inputs or not targets:
        raise TypeError(
            "Expected a validation batch to be a tuple or list of (inputs, target), or a dict or "
            f"dataclass with one of {_INPUT_NAMES} and one of {_TARGET_NAMES}, but got "
            f"{type(batch).__name__} with fields {sorted(fields)}. Override "
            "`saflex_val_batch(batch)` to return (inputs, target)."
        )
    return fields[inputs[0]], fields[targets[0]]
