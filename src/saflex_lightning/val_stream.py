"""Where validation batches come from, once a loader is chosen."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from .draws import EndlessBatchSampler, mix_seed
from .engines import unchanged_generators
from .sources import is_plain

__all__ = ["ValidationStream"]

_CACHE_BYTES = 256 * 2**20

Transfer = Callable[[Any], Any]


class ValidationStream:
    """Draw validation batches from one persistent dataloader, endlessly.

    A map-style dataset behind a plain sampler is drawn through `EndlessBatchSampler`; any other
    loader (a weighted sampler, an iterable dataset, a list of batches) is repeated as it is, and
    what each rank sees is then up to that loader. From such a loader a resumed run first draws and
    drops what was drawn before. Drawing leaves the global random state alone.

    Args:
        loader: A dataloader, or any iterable of batches.
        transfer: Moves a batch to the device.
        batch_size: Rows per batch and process; None keeps the loader's own.
        seed: Seed of the order, the same on every rank.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes that load batches; None keeps the loader's own number.
        cache: Keep the whole dataset on the device: True, False, or ``"auto"`` for under 256 MB.
        start: Batches drawn before, by a run that this one resumes.
        device: Where transfer hooks may draw random numbers, beside the CPU.

    Raises:
        ValueError: If ``cache`` is True and a batch is not made of tensors with one entry per row.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        transfer: Transfer,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        cache: bool | str = "auto",
        start: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.draws = start
        self._transfer = transfer
        self._seed, self._rank = seed, rank
        self._device = torch.device("cpu") if device is None else device
        self._cached: Any = None
        self._sampler: EndlessBatchSampler | None = None
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        if not is_plain(loader):
            if isinstance(loader, DataLoader):
                # Persistent workers serve one iterator at a time, and the Trainer's own is another.
                loader = self._loader = copy(loader)
                loader._iterator = None
            self._iterator = _repeat(loader)
            for number in range(start):  # only by going there can its place be found
                with self._own_random_state(number):
                    next(self._iterator)
            return
        assert isinstance(loader, DataLoader)
        dataset: Any = loader.dataset
        self._sampler = EndlessBatchSampler(
            len(dataset),
            batch_size or loader.batch_size or 1,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start=start,
        )
        with self._own_random_state(-1):
            if cache is True or (cache == "auto" and _fits(loader)):
                self._cached = self._load_all(loader)
            if cache is True and self._cached is None:
                raise ValueError(
                    "Expected validation batches made of tensors with one entry per row for "
                    "`cache_on_device=True`, but the batch holds something else. Pass "
                    "`cache_on_device=False`."
                )
        if self._cached is None:
            workers = loader.num_workers if num_workers is None else num_workers
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._sampler,
                num_workers=workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout if workers else 0,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context if workers else None,
                persistent_workers=workers > 0,
                generator=torch.Generator().manual_seed(mix_seed(seed, start)),
            )
            self._iterator = iter(self._loader)

    def draw(self) -> Any:
        """Return the next batch, on the device.

        Returns:
            A batch as the loader's collate function makes it.

        Raises:
            RuntimeError: If the stream was closed.
        """
        draw, self.draws = self.draws, self.draws + 1
        if self._cached is not None and self._sampler is not None:
            return _take(self._cached, self._sampler.rows(draw))
        if self._iterator is None:
            raise RuntimeError("Expected an open validation stream, but it was closed.")
        with self._own_random_state(draw):
            return self._transfer(next(self._iterator))

    def close(self) -> None:
        """End the worker processes and let go of the loader."""
        if self._loader is not None:
            # Letting go is not enough: the traceback of a worker's error holds the iterator.
            CombinedLoader(self._loader).reset()
        self._loader = self._iterator = self._cached = None

    @contextmanager
    def _own_random_state(self, draw: int) -> Iterator[None]:
        with unchanged_generators((torch.empty(0, device=self._device),)):
            number = mix_seed(self._seed, draw, self._rank)
            torch.manual_seed(number)
            np.random.seed(number % 2**32)  # noqa: NPY002  transforms draw from the global state
            random.seed(number)
            yield

    def _load_all(self, loader: DataLoader[Any]) -> Any:
        dataset: Any = loader.dataset
        batch = self._transfer(loader.collate_fn([dataset[row] for row in range(len(dataset))]))
        return batch if _tensors_only(batch, len(dataset)) else None


def _repeat(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise MisconfigurationException(
                "Expected the validation dataloader of SAFLEX to yield batches, but it yielded "
                "none. Give it at least one row, and an iterable that can be iterated again."
            )


def _fits(loader: DataLoader[Any]) -> bool:
    dataset: Any = loader.dataset
    sample = loader.collate_fn([dataset[0]])
    sizes: list[int] = []
    apply_to_collection(sample, Tensor, lambda t: sizes.append(t.numel() * t.element_size()))
    return sum(sizes) * len(dataset) <= _CACHE_BYTES


def _tensors_only(batch: Any, num_rows: int) -> bool:
    leaves: list[bool] = []
    apply_to_collection(
        batch,
        object,
        lambda leaf: leaves.append(
            isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == num_rows
        ),
        wrong_dtype=(dict, list, tuple),
    )
    return bool(leaves) and all(leaves)


def _take(batch: Any, rows: list[int]) -> Any:
    chosen = torch.tensor(rows)
    return apply_to_collection(
        batch, Tensor, lambda t: t[chosen.to(t.device, non_blocking=t.is_cuda)]
    )
