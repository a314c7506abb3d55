"""Signals that wait while a model is not as its owner left it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["delayed_signals"]

_NUMBERS = tuple(map(int, signal.valid_signals()))


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Handle signals that arrive in the block when it is over.

    A handler may look at the model (SLURM's requeue signal writes a checkpoint) or raise wherever
    the program is, a clean-up included (Ctrl-C, and torch's watch over its loader workers). A
    signal that arrives a second time is handled at once, so that a block that hangs can be left.

    Yields:
        Nothing.
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
        for number in _NUMBERS:
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
