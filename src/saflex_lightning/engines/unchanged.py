"""State that an extra pass must not change: buffers, modes and random states."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from . import foreach
from .signals import delayed_signals

__all__ = ["unchanged_generators", "unchanged_state"]


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
    buffers = [b for _, _, slots in kept for b in slots.values() if b is not None]
    tensors = [buffer for buffer in buffers if not _is_expanded(buffer)]
    saved = [torch.empty_like(tensor) for tensor in tensors]
    foreach.copy_(saved, tensors)
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
            # Through `data`, since what is the same again must not invalidate earlier graphs.
            foreach.copy_([tensor.data for tensor in tensors], saved)


def _is_expanded(buffer: Tensor) -> bool:
    """Say whether several entries share memory, so that nobody can write in place."""
    if buffer.layout != torch.strided:
        return False
    return any(
        size > 1 and not step for size, step in zip(buffer.shape, buffer.stride(), strict=True)
    )


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
