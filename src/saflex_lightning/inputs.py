"""Inputs of a forward that runs more than once: it must not write in them."""

from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .engines import Scores, UnsupportedModelError

__all__ = ["unwritten"]


def unwritten(scores: Callable[..., Scores], inputs: Any) -> Callable[..., Scores]:
    """Return a function that scores, and refuses a model that writes in its inputs.

    A later forward would otherwise see what an earlier one has left of them.

    Args:
        scores: Function from inputs to scores.
        inputs: The inputs that are watched, tensors in any collection.

    Returns:
        The function; it raises `UnsupportedModelError` once one of them was written in.
    """
    tensors: list[Tensor] = []
    apply_to_collection(inputs, Tensor, tensors.append, allow_frozen=True)
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    versions = [tensor._version for tensor in tensors]

    def scores_unwritten(*args: Any, **kwargs: Any) -> Scores:
        result = scores(*args, **kwargs)
        if [tensor._version for tensor in tensors] != versions:
            raise UnsupportedModelError(
                "Expected a forward that leaves its inputs as they are, for it runs more than once "
                "in a step, but it wrote in them in place. Write `x = x - mean` in place of "
                "`x.sub_(mean)`, and pass `inplace=False` to the first layers."
            )
        return result

    return scores_unwritten
