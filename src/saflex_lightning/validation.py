"""Where validation batches come from, and the gradient that steers.

The stream is a function of (seed, draw number, rank): every rank cuts its slice from one endless
sequence of permutations, so several processes together see the batch that one would see, and a
resumed run needs to remember nothing but how many batches were drawn.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from .engines import Tangent, make_tangent, unchanged_generators
from .functional import Preset, ReduceSum

__all__ = [
    "EndlessBatchSampler",
    "ValidationGradient",
    "ValidationStream",
    "count_rows",
    "is_plain",
    "mix_seed",
    "same_rows",
]

_CACHE_BYTES = 256 * 2**20

Transfer = Callable[[Any], Any]


class EndlessBatchSampler(Sampler[list[int]]):
    """Yield this rank's rows of one shuffled pass after another, without end.

    Args:
        num_rows: Rows of the dataset.
        batch_size: Rows per batch and process.
        seed: Seed of the permutations, the same on every rank.
        rank: This process.
        world_size: Number of processes.
        start: Number of the first draw.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._pass = -1
        self._order: list[int] = []

    def rows(self, draw: int) -> list[int]:
        """Return the rows of one draw.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            ``batch_size`` row numbers. A batch that crosses from one pass into the next may hold a
            row twice.
        """
        first = (draw * self.world_size + self.rank) * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(draw) for draw in itertools.count(self.start))

    def _row(self, position: int) -> int:
        number, place = divmod(position, self.num_rows)
        if number != self._pass:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._pass = number
        return self._order[place]


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


class ValidationGradient:
    r"""Keep the direction that steers: the validation gradient over ranks and over refreshes.

    .. math:: \bar g \leftarrow d^n \bar g + (1 - d^n)\, g

    n training batches after the last refresh, started at the first finite g. A non-finite g leaves
    the average as it was and makes the solve of that one step unusable.

    Args:
        preset: Tells decay and refresh interval.
    """

    def __init__(self, preset: Preset) -> None:
        self._decay = preset.gradient_decay
        self._interval = preset.refresh_every_n_steps
        self._state: dict[str, Any] = {
            "refreshed": None,  # number of the training batch of the last refresh
            "average": None,
            "direction": None,
            "length": None,
            "started": None,
            "finite": None,
            "norm": None,
        }

    @property
    def tangent(self) -> Tangent:
        """The direction in use, from `make_tangent`."""
        return Tangent(self._state["direction"], self._state["length"])

    @property
    def norm(self) -> Tensor:
        """Norm of the newest gradient before averaging, scalar."""
        return self._state["norm"]

    def is_due(self, number: int) -> bool:
        """Say whether a training batch calls for a new gradient.

        Args:
            number: Number of the training batch.

        Returns:
            True at the first batch and from ``refresh_every_n_steps`` after the last refresh on.
        """
        refreshed = self._state["refreshed"]
        return refreshed is None or number >= refreshed + self._interval

    def is_usable(self, number: int) -> Tensor:
        """Say whether the direction may be used at a training batch, without waiting for it.

        Args:
            number: Number of the training batch.

        Returns:
            Scalar bool: False before the first finite gradient, and at a batch whose own gradient
            was not finite.
        """
        if number == self._state["refreshed"]:
            return self._state["started"] & self._state["finite"]
        return self._state["started"]

    def refresh(
        self,
        number: int,
        gradient: Sequence[Tensor],
        second_moments: Sequence[Tensor] | None = None,
        *,
        reduce_sum: ReduceSum | None = None,
        world_size: int = 1,
    ) -> None:
        """Take a new gradient into the average and derive the direction from it.

        Args:
            number: Number of the training batch.
            gradient: g of this rank, one tensor per parameter.
            second_moments: Adam's, see `make_tangent`.
            reduce_sum: Adds one flat tensor over ranks.
            world_size: Number of ranks.
        """
        if reduce_sum is not None:
            flat = reduce_sum(torch.cat([part.reshape(-1) for part in gradient])) / world_size
            pieces = flat.split([part.numel() for part in gradient])
            gradient = [piece.view_as(part) for piece, part in zip(pieces, gradient, strict=True)]
        state = self._state
        state["norm"] = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(part) for part in gradient])
        )
        finite = state["finite"] = torch.isfinite(state["norm"])
        if state["average"] is None:
            state["average"] = tuple(torch.zeros_like(part) for part in gradient)
            state["started"] = torch.zeros_like(finite)
        elapsed = number - (state["refreshed"] or 0)
        share = torch.where(state["started"], 1 - self._decay**elapsed, 1.0)
        for average, new in zip(state["average"], gradient, strict=True):
            average.lerp_(torch.where(finite, new, average), share.to(average.dtype))
        state["started"] = state["started"] | finite
        state["refreshed"] = number
        state["direction"] = None  # its memory serves the next one
        state["direction"], state["length"] = make_tangent(state["average"], second_moments)

    def to(self, device: torch.device) -> None:
        """Move the tensors, after `load_state_dict`.

        Args:
            device: Where the parameters live.
        """
        self._state = apply_to_collection(self._state, Tensor, lambda tensor: tensor.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        # Averages are updated in place: the dictionary's own tensors must stay as they are.
        self._state = apply_to_collection(dict(state), Tensor, torch.clone)


def is_plain(loader: object) -> bool:
    """Say whether a loader is a dataset in batches, with no sampling of its own.

    Args:
        loader: A dataloader or another iterable.

    Returns:
        True if the stream may draw from the loader's dataset in its own order.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    plain = isinstance(sampler, (SequentialSampler, DistributedSampler)) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    return plain and type(loader.batch_sampler) is BatchSampler


def count_rows(loader: object) -> int | None:
    """Return how many rows a loader's dataset has.

    Args:
        loader: A dataloader or another iterable.

    Returns:
        The number, or None where only iterating could tell.
    """
    dataset = getattr(loader, "dataset", loader if isinstance(loader, (list, tuple)) else None)
    return len(dataset) if isinstance(dataset, Sized) else None


def same_rows(first: object, second: object) -> bool:
    """Say whether two datasets hold the same rows: one object, or subsets of it that overlap.

    Args:
        first: A dataset.
        second: Another.

    Returns:
        True if at least one row is known to be in both.
    """
    if isinstance(first, Subset) and isinstance(second, Subset):
        shared = set(first.indices) & set(second.indices)
        return bool(shared) and same_rows(first.dataset, second.dataset)
    if isinstance(first, Subset):
        return same_rows(first.dataset, second)
    if isinstance(second, Subset):
        return same_rows(first, second.dataset)
    return first is second


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
    return apply_to_collection(batch, Tensor, lambda t: t[torch.tensor(rows, device=t.device)])


def mix_seed(*numbers: int) -> int:
    """Return one seed made from several numbers, such as (seed, step, rank).

    Args:
        *numbers: Integers.

    Returns:
        A number in [0, 2**63).
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
