"""What a pass of ours leaves as it was: buffers, modes, random state, signals, precision."""

import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from .errors import UnsupportedModelError

__all__ = [
    "copy_all",
    "delayed_signals",
    "extra_pass",
    "full_precision",
    "untouched",
    "untouched_generators",
    "unwritten",
]

_COMMON = frozenset(vars(nn.Module()))  # attributes that every module has
_SIGNALS = tuple(map(int, signal.valid_signals()))
_torch: Any = torch  # joined operations are documented, and exported under private names alone


@contextmanager
def untouched(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore buffers (objects, sizes, values), training modes and random state on every exit.

    With a seed, the block draws from that.
    """
    parts = list(module.modules())
    kept = [(part, part.training, dict(part._buffers)) for part in parts]
    buffers = [b for _, _, slots in kept for b in slots.values() if b is not None]
    tensors = [buffer for buffer in buffers if not _is_expanded(buffer)]
    saved = [torch.empty_like(tensor) for tensor in tensors]
    copy_all(saved, tensors)
    with delayed_signals(), untouched_generators(seed):
        try:
            yield
        finally:
            for part, mode, slots in kept:
                if part.training != mode:  # an assignment to a module is slow
                    part.training = mode
                part._buffers.clear()
                part._buffers.update(slots)
            for tensor, value in zip(tensors, saved, strict=True):
                if tensor.shape != value.shape:
                    tensor.resize_(value.shape)  # observers of quantisation grow theirs
            # Through `data`, since what is the same again must not invalidate earlier graphs.
            copy_all([tensor.data for tensor in tensors], saved)


@contextmanager
def extra_pass(module: nn.Module) -> Iterator[list[str]]:
    """Run a forward beside the training: in full precision, and without a trace.

    It undoes what the forward counts, stores in or appends to attributes of its modules, and puts
    by the cache of parametrizations; buffers, modes and random state are `untouched`'s. Yields the
    names of what would have rounded, filled while the block runs.

    Raises:
        UnsupportedModelError: If it wrote in a parameter, or in a tensor that is an attribute, in
            place.
    """
    attributes = [_Attributes(part) for part in module.modules()]
    versions = [(parameter, parameter._version) for parameter in module.parameters()]
    device_type = versions[0][0].device.type if versions else "cpu"
    with _own_parametrization_cache(), full_precision(device_type) as ignored:
        try:
            yield ignored
        finally:
            places = [place for part in attributes for place in part.restore()]
    changed = [parameter for parameter, version in versions if parameter._version != version]
    if changed or places:
        parts = {part: name for name, part in module.named_modules()}
        names = [name for name, p in module.named_parameters() if any(p is q for q in changed)]
        names += [f"{parts[part]}.{name}".lstrip(".") for part, name in places]
        raise UnsupportedModelError(
            "Expected a forward that can be run beside the training, but it wrote in "
            f"`{names[0]}` in place, which cannot be taken back. Update that in "
            "`on_train_batch_end`; in evaluation leave it alone (`if self.training`)."
        )


class _Attributes:
    """What a module has beside parameters, buffers and submodules, as it was at some moment."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._values = dict(vars(part))
        own = [entry for entry in self._values.items() if entry[0] not in _COMMON]
        found: dict[int, Any] = {}
        for _, value in own:
            _find_containers(value, found)
        self._contents = [(value, copy(value)) for value in found.values()]
        self._versions = [
            (name, value, value._version)
            for name, value in own
            if isinstance(value, Tensor) and not value.is_inference()
        ]

    def restore(self) -> list[tuple[nn.Module, str]]:
        """Put everything back; return the tensors that were written in place."""
        now, before = vars(self._part), self._values
        for name in now.keys() - before.keys():
            del now[name]
        for name, value in before.items():
            if now.get(name, now) is not value:
                now[name] = value
        for container, content in self._contents:
            if not _has_same_items(container, content):
                container.clear()
                fill: Any = getattr(container, "extend", None) or getattr(container, "update", None)
                fill(content)
        return [(self._part, name) for name, value, v in self._versions if value._version != v]


def _find_containers(value: Any, found: dict[int, Any]) -> None:
    """Add what can be appended to, by its identity: a value, and what it holds."""
    if not isinstance(value, (list, dict, set, deque, tuple)) or id(value) in found:
        return
    if not isinstance(value, tuple):
        found[id(value)] = value
    for part in value.values() if isinstance(value, dict) else value:
        _find_containers(part, found)


def _has_same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(name in other and value is other[name] for name, value in one.items())
    if isinstance(one, set):
        return one == other
    return all(a is b for a, b in zip(one, other, strict=True))


@contextmanager
def _own_parametrization_cache() -> Iterator[None]:
    """Run the block with an empty cache of parametrizations, where a caller has one switched on."""
    cache: Any = nn.utils.parametrize._cache
    kept = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        cache.update(kept)


@contextmanager
def untouched_generators(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of torch, of every CUDA device, of NumPy and of Python.

    With a seed, the block draws from that.
    """
    # `torch.manual_seed` writes down a traceback for each CUDA device that is not there.
    generators = [torch.default_generator, *torch.cuda.default_generators]
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  transforms draw from the global state
            random.seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def unwritten(run: Callable[[], Any], inputs: Any) -> Callable[[], Any]:
    """Return a forward that is refused once it has written in its inputs, which are read again."""
    tensors: list[Tensor] = []
    apply_to_collection(inputs, Tensor, tensors.append, allow_frozen=True)
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    versions = [tensor._version for tensor in tensors]

    def run_unwritten() -> Any:
        result = run()
        if [tensor._version for tensor in tensors] != versions:
            raise UnsupportedModelError(
                "Expected a forward that leaves its inputs as they are, for it runs more than once "
                "in a step, but it wrote in them in place. Write `x = x - mean` in place of "
                "`x.sub_(mean)`, pass `inplace=False` to the first layers, or engine='head', which "
                "runs it once."
            )
        return result

    return run_unwritten


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Handle signals that arrive in the block when it is over.

    A handler may look at the model (SLURM's requeue signal writes a checkpoint) or raise wherever
    the program is, a clean-up included (Ctrl-C, and torch's watch over its loader workers). A
    signal that arrives a second time is handled at once, so that a block that hangs can be left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread runs handlers
        return
    handlers: dict[int, Any] = {}
    arrived: list[int] = []
    is_over = False

    def delay(number: int, frame: FrameType | None) -> None:
        if is_over or number in arrived:
            handlers[number](number, frame)
        else:
            arrived.append(number)

    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, delay)
        yield
    finally:
        is_over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


@contextmanager
def full_precision(device_type: str) -> Iterator[list[str]]:
    """Run the block without autocast, the model's own included; yield what was switched off.

    Weights that autocast cast before the block are not reused in it, nor the block's after it.
    """
    ignored = ["autocast"] if torch.is_autocast_enabled(device_type) else []
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device_type, enabled=False):
            switch = torch.set_autocast_enabled

            def ignore(*setting: object) -> None:
                # A forward that opens autocast itself would switch it on again.
                if setting[-1]:
                    ignored.append("autocast inside the model")

            torch.set_autocast_enabled = ignore
            try:
                yield ignored
            finally:
                torch.set_autocast_enabled = switch
    finally:
        torch.clear_autocast_cache()


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same kinds, on a GPU in one launch for each kind."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        same_targets, same_sources = kinds.setdefault((target.dtype, target.device), ([], []))
        same_targets.append(target)
        same_sources.append(source)
    for same_targets, same_sources in kinds.values():
        _torch._foreach_copy_(same_targets, same_sources)


def _is_expanded(buffer: Tensor) -> bool:
    """Say whether several entries share memory, so that nobody can write in place."""
    if buffer.layout != torch.strided:
        return False
    return any(
        size > 1 and not step for size, step in zip(buffer.shape, buffer.stride(), strict=True)
    )
