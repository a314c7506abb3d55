"""Operations on many tensors: on a GPU one launch for all of a kind, not one for each.

torch documents them and exports them under private names alone. Where they cannot be joined
(mixed dtypes, unlike strides, an old torch, a CPU) torch goes through the tensors one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saflex_lightning.functional import widen

__all__ = ["add", "add_", "copy_", "div", "div_", "mul", "norm", "sqrt"]

_torch: Any = torch
add = _torch._foreach_add
add_ = _torch._foreach_add_
div = _torch._foreach_div
div_ = _torch._foreach_div_
mul = _torch._foreach_mul
sqrt = _torch._foreach_sqrt


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same kinds.

    Args:
        targets: What is overwritten.
        sources: One tensor for each.
    """
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        same_targets, same_sources = kinds.setdefault((target.dtype, target.device), ([], []))
        same_targets.append(target)
        same_sources.append(source)
    for same_targets, same_sources in kinds.values():
        _torch._foreach_copy_(same_targets, same_sources)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries together, scalar, in float32 or wider.

    Args:
        tensors: At least one.
    """
    return torch.linalg.vector_norm(torch.stack(_torch._foreach_norm([widen(t) for t in tensors])))
