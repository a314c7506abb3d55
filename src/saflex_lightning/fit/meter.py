"""How much longer refined steps take than plain ones, measured in the fit itself."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from saflex_lightning.functional.settings import Settings

__all__ = ["Meter"]

_BLOCKS = 8  # refined and plain in turn
_FEWEST_STEPS = 10  # of a block; evidence is fitted anew about so often


class Meter:
    """Time the first training steps of a run; every other block of them is to be plain.

    The first step of a block is not counted. The others look at validation rows as often as all
    later steps do.

    Args:
        settings: Of the fit.
        clock: Returns seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        look = settings.every_n_steps * math.ceil(
            settings.refresh_every_n_steps / settings.every_n_steps
        )
        self.counted = look * math.ceil(_FEWEST_STEPS / look)  # steps of a block
        self.batches = _BLOCKS * (self.counted + 1)  # of the run, which are measured
        self.refined: list[float] = []  # seconds of blocks
        self.plain: list[float] = []
        self.ratio: float | None = None  # of their medians, once all were measured
        self._number = 0
        self._times: list[float] = []  # of the steps of this block
        self._started: float | None = None
        self._device = torch.device("cpu")

    def is_plain(self, number: int) -> bool:
        """Say whether a training batch of the run, from 0, is to be trained plainly."""
        return number < self.batches and number // (self.counted + 1) % 2 == 1

    def begin(self, number: int, device: torch.device) -> None:
        """Start the clock where the step of a training batch is to be counted."""
        self._number, self._device = number, device
        if number < self.batches:
            if number % (self.counted + 1):
                self._started = self._now()
            else:
                self._times = []

    def end(self) -> None:
        """Stop the clock; say the ratio at the end of the last block."""
        if self._started is None:
            return
        self._times.append(self._now() - self._started)
        self._started = None
        if len(self._times) == self.counted:  # less where a run was resumed in mid-block
            blocks = self.plain if self.is_plain(self._number) else self.refined
            blocks.append(sum(self._times))
        if self._number == self.batches - 1 and self.refined and self.plain:
            refined, plain = statistics.median(self.refined), statistics.median(self.plain)
            self.ratio = refined / plain
            rank_zero_info(
                f"A training step takes {100 * (self.ratio - 1):+.0f} % with SAFLEX: "
                f"{1000 * refined / self.counted:.3g} ms in place of "
                f"{1000 * plain / self.counted:.3g} ms, medians of {len(self.refined)} and "
                f"{len(self.plain)} blocks of {self.counted} steps."
            )

    def say_unfinished(self) -> None:
        """Say, at the end of a fit, that there is no ratio."""
        if self.ratio is None:
            rank_zero_info(
                f"SAFLEX measured no overhead: that takes the first {self.batches} training "
                "batches of a run, and this fit did not have all of them."
            )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
