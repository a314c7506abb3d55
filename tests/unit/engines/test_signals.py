"""Signals that arrive while a model is changed are handled afterwards."""

import signal
import threading

import pytest

from saflex_lightning.engines.untouched import delayed_signals


@pytest.fixture
def handled():
    """Numbers of the user signals that were handled, in order."""
    numbers = []
    numbers_used = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers_used}
    for number in numbers_used:
        signal.signal(number, lambda number, frame: numbers.append(number))
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_for_the_end_of_the_outermost_block(handled):
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with delayed_signals():
        with delayed_signals():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
        assert handled == []
    assert handled == [signal.SIGUSR2, signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers


def test_a_second_signal_of_a_kind_does_not_wait(handled):
    with delayed_signals():
        signal.raise_signal(signal.SIGUSR1)
        assert handled == []
        signal.raise_signal(signal.SIGUSR1)
        assert handled == [signal.SIGUSR1]
    assert handled == [signal.SIGUSR1] * 2


def test_ctrl_c_interrupts_after_the_block(handled):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    reached = False

    def run():
        nonlocal reached
        with delayed_signals():
            signal.raise_signal(signal.SIGINT)
            reached = True

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_in_the_block_puts_the_handlers_back(handled):
    handler = signal.getsignal(signal.SIGUSR1)

    def run():
        with delayed_signals():
            signal.raise_signal(signal.SIGUSR1)
            raise ValueError("own words")

    with pytest.raises(ValueError, match="own words"):
        run()
    assert handled == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_threads_may_enter_the_block():
    entered = []

    def run():
        with delayed_signals():
            entered.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [True]
