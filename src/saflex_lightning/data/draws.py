"""Random draws that are a function of a few numbers, whatever else the process draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_generators", "mix_seeds", "seed_draws", "seeded_draws"]


def mix_seeds(*numbers: int) -> int:
    """Return one seed in [0, 2**32) made from several non-negative numbers, such as (seed, epoch).

    Neighbouring numbers give seeds far from one another.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_draws(*key: int) -> None:
    """Make the draws that follow a function of some non-negative numbers, in `kept_generators`."""
    draw = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    # The default generator is seeded by itself because torch.manual_seed would reseed the
    # accelerator's too.
    torch.default_generator.manual_seed(draw)
    random.seed(draw)
    np.random.seed(draw % 2**32)  # noqa: NPY002  others' code draws from it


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put back the global generators, torch's for the CPU, NumPy's and Python's, and the threads.

    One thread computes meanwhile: sharing out an image of 28 pixels takes longer than augmenting
    it, and far longer (a factor of 40 was seen) while another process has one of the cores.
    """
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def seeded_draws(*key: int) -> Iterator[None]:
    """Make every draw from the global generators a function of some non-negative numbers alone."""
    with kept_generators():
        seed_draws(*key)
        yield
