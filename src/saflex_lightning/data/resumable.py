"""A training loader whose place in the epoch goes into Lightning's checkpoints."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from .checks import check

__all__ = ["EpochSampler", "ResumableLoader", "ResumableSampler", "check_dataset", "draw_and_row"]


class ResumableSampler(DistributedSampler[Any]):
    """Shuffled row numbers, an order for each epoch, from any place on.

    Args:
        dataset: Rows; only its length is asked for.
        num_replicas: Number of processes; None takes that of the process group, once there is one.
        rank: Which of them this is.
        weights: How often rows are drawn, ``(rows,)``, on any scale: with replacement, as many as
            there are. None takes each row once.
        **kwargs: As for `DistributedSampler`.

    Raises:
        TypeError: If the weights are no tensor.
        ValueError: If they are not those of the rows, or none is positive.
    """

    start = 0

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        *,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        rows = cast("Dataset[Any]", range(len(dataset)))
        super().__init__(rows, num_replicas or 1, rank or 0, **kwargs)
        self.weights = _checked(weights, len(dataset))
        self._is_shared = num_replicas is not None

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of one pass but the first `start`, which counts for this pass only."""
        self._join_group()
        start, self.start = self.start, 0
        rows = super().__iter__() if self.weights is None else self._draw(self.weights)
        return (row for place, row in enumerate(rows) if place >= start)

    def _draw(self, weights: Tensor) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        places = torch.rand(self.total_size, dtype=torch.float64, generator=generator)
        ends = weights.cumsum(0)  # `torch.multinomial` takes 2**24 rows at most
        rows = torch.searchsorted(ends, places * ends[-1], right=True).clamp(max=len(ends) - 1)
        return iter(rows[self.rank :: self.num_replicas].tolist())

    def __len__(self) -> int:
        self._join_group()
        return super().__len__()

    def _join_group(self) -> None:
        if self._is_shared or not (dist.is_available() and dist.is_initialized()):
            return
        self._is_shared, epoch = True, self.epoch
        share = (dist.get_world_size(), dist.get_rank())
        super().__init__(self.dataset, *share, self.shuffle, self.seed, self.drop_last)
        self.epoch = epoch


def _checked(weights: Tensor | None, num_rows: int) -> Tensor | None:
    """Return weights that rows can be drawn by."""
    if weights is None:
        return None
    if not isinstance(cast("Any", weights), Tensor):
        raise TypeError(
            f"Expected `weights` to be a tensor of {num_rows} numbers, one of each row, but got "
            f"{type(weights).__name__}. Pass what `read_row_weights` returns."
        )
    if weights.shape != (num_rows,):
        raise ValueError(
            f"Expected `weights` of shape {(num_rows,)}, one of each row, but got "
            f"{tuple(weights.shape)}. Add ones for rows that an earlier run did not have."
        )
    if not (bool(weights.isfinite().all()) and bool((weights >= 0).all()) and weights.sum() > 0):
        raise ValueError(
            "Expected finite `weights` of 0 or more, one of them positive, but got "
            f"{weights.min():g} to {weights.max():g}. Pass what `read_row_weights` returns."
        )
    return weights.double()


class EpochSampler(ResumableSampler):
    """Shuffled ``(draw, row)`` pairs, no two of them alike, by which rows are augmented anew.

    The draw is the epoch; where rows come by weight, several times in one, it counts their places
    over all epochs.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, rows = self.start, super().__iter__()
        if self.weights is None:
            return ((self.epoch, row) for row in rows)
        offset = self.epoch * self.total_size + self.rank
        return ((offset + self.num_replicas * place, row) for place, row in enumerate(rows, first))


def draw_and_row(key: tuple[int, int] | int) -> tuple[int, int]:
    """Return a key of `EpochSampler` as it is, and a plain row number as one of draw 0.

    Lightning's ``overfit_batches`` puts a sampler of plain row numbers in the place of ours.
    """
    return key if isinstance(key, tuple) else (0, key)


class ResumableLoader(DataLoader[Any]):
    """Go on in the middle of an epoch: the next batch is the one that an interrupted run lacked.

    Lightning saves and loads the state of a training loader that has one. The order of the rows
    must be a function of the epoch, which Lightning tells the sampler: hence the sampler's type.
    Rows that are augmented at random are the same again only where the draws depend on the epoch
    and the row (see `UnionDataset`), not on how many were made before.

    Args:
        dataset: Rows.
        batch_size: Rows per batch and process; None where an item of the dataset is a whole batch.
        sampler: The order of the rows, or of the batches.
        **kwargs: As for `DataLoader`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If it is out of its range, or the dataset has no rows.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None,
        *,
        sampler: ResumableSampler,
        **kwargs: Any,
    ) -> None:
        check_dataset(dataset)
        if not isinstance(cast("Any", sampler), Sampler):
            raise TypeError(
                f"Expected `sampler` to be a sampler of torch, but got {type(sampler).__name__}. "
                "Pass a `ResumableSampler` of the dataset."
            )
        check("a positive integer", optional=True, batch_size=batch_size)
        check("a non-negative integer", num_workers=kwargs.get("num_workers", 0))
        check("True or False", drop_last=kwargs.get("drop_last", False))
        check("a function", optional=True, collate_fn=kwargs.get("collate_fn"))
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        self._place = (0, 0)  # epoch, and batches of it that were taken
        self._resumed = (0, 0)

    @property
    def group_names(self) -> tuple[str, ...] | None:
        """What each value of ``AugmentedBatch.group`` stands for; None where no dataset tells."""
        return getattr(self.dataset, "group_names", None)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches of one epoch; what a loaded state counts as taken is left out."""
        # A generator, not torch's own class of iterators, so that workers start when the first
        # batch is asked for: Lightning makes the iterator of a resumed run before it tells the
        # sampler the epoch.
        sampler = self.sampler
        if isinstance(sampler, ResumableSampler):  # `overfit_batches` puts another in its place
            epoch, taken = self._resumed
            self._resumed = (0, 0)
            self._place = (sampler.epoch, taken if epoch == sampler.epoch else 0)
            sampler.start = self._place[1] * (self.batch_size or 1)
        for batch in super().__iter__():
            self._place = (self._place[0], self._place[1] + 1)
            yield batch

    def __getstate__(self) -> dict[str, Any]:
        """Put the state of the generator in its place, which no spawned process could open."""
        state, generator = dict(vars(self)), self.generator
        if generator is not None:
            state["generator"] = generator.get_state().numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a generator of its state."""
        vars(self).update(state)
        if state["generator"] is not None:
            generator = torch.Generator()
            generator.set_state(torch.from_numpy(state["generator"]))
            vars(self)["generator"] = generator

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were taken; equal on every rank."""
        epoch, taken = self._place
        return {"epoch": epoch, "taken": taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called.

        Args:
            state: What that returned.

        Raises:
            TypeError: If it is something else.
            ValueError: If an entry of it is negative.
        """
        check("a mapping of names to values", state=state)
        place: dict[str, Any] = {name: state.get(name) for name in ("epoch", "taken")}
        check("a non-negative integer", **place)
        self._place = self._resumed = (state["epoch"], state["taken"])


def check_dataset(dataset: Any) -> None:
    """Refuse what has no rows by number."""
    whole = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not whole or isinstance(dataset, (IterableDataset, Mapping, str, bytes)):
        raise TypeError(
            "Expected `dataset` to be map-style, with a length and rows by number, but got "
            f"{type(dataset).__name__}. Read its rows into a list, or index them."
        )
    if not len(dataset):
        raise ValueError(
            f"Expected `dataset` to hold rows, but this {type(dataset).__name__} has none. Look at "
            "what it is made from."
        )
