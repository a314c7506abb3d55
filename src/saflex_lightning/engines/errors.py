"""What an engine says when it cannot differentiate a model, and how the culprit is found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .unchanged import unchanged_state

__all__ = ["UnsupportedModelError", "is_out_of_memory", "refuse_unsupported"]


class UnsupportedModelError(ValueError):
    """The chosen engine cannot differentiate this model; the message names one that can."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device or the machine has no memory left.

    Args:
        error: What was raised.

    Returns:
        True for torch's errors of CUDA devices and of the CPU, and for Python's.
    """
    return (
        isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in str(error)  # the CPU's is a plain RuntimeError
    )


@contextmanager
def refuse_unsupported(
    module: nn.Module,
    engine: str,
    instead: str,
    *,
    plain: Callable[[], object],
    retry: Callable[[], object],
) -> Iterator[None]:
    """Turn a failure inside an engine's own pass into an error that names the submodule.

    A model that fails without the engine too shows its own error, and so does a pass that works
    when it is repeated: a lack of memory, a worker process that died meanwhile.

    Args:
        module: The model.
        engine: Name of the engine at work.
        instead: What to do, as an instruction.
        plain: The same pass without the engine.
        retry: Repeats the failed pass; it runs once more with hooks that find the submodule.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: If the pass inside the block failed, other than by running out of
            memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UnsupportedModelError) or is_out_of_memory(error):
            raise
        with unchanged_state(module), torch.no_grad():
            plain()
        name = _failing_submodule(module, retry)
        if name is None:
            raise
        raise UnsupportedModelError(
            f"Expected every submodule to work with engine='{engine}', but {name} raised "
            f"{type(error).__name__}: {error} {instead}"
        ) from error


def _failing_submodule(module: nn.Module, retry: Callable[[], object]) -> str | None:
    entered: list[nn.Module] = []

    def enter(submodule: nn.Module, _args: object) -> None:
        entered.append(submodule)

    def leave(submodule: nn.Module, _args: object, _output: object) -> None:
        if entered and entered[-1] is submodule:
            entered.pop()

    names = {submodule: name for name, submodule in module.named_modules()}
    handles = [submodule.register_forward_pre_hook(enter) for submodule in names]
    handles += [submodule.register_forward_hook(leave) for submodule in names]
    try:
        retry()
        return None
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    culprit = entered[-1] if entered else module
    return f"submodule `{names.get(culprit) or 'the model itself'}` ({type(culprit).__name__})"
