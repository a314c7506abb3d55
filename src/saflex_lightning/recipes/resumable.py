"""A training loader whose place in the epoch goes into Lightning's checkpoints."""

from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

__all__ = ["ResumableLoader", "ResumableSampler"]


class ResumableSampler(DistributedSampler[Any]):
    """Shuffled row numbers, an order for each epoch, from any place on.

    With ``num_replicas=1, rank=0`` it serves one process.

    Args:
        dataset: Rows; only its length is asked for.
        **kwargs: As for `DistributedSampler`.
    """

    start = 0

    def __init__(self, dataset: Sized, **kwargs: Any) -> None:
        super().__init__(cast("Dataset[Any]", range(len(dataset))), **kwargs)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of one pass but the first `start`, which counts for this pass only."""
        start, self.start = self.start, 0
        for place, row in enumerate(super().__iter__()):
            if place >= start:
                yield row


class ResumableLoader(DataLoader[Any]):
    """Go on in the middle of an epoch: the next batch is the one that an interrupted run lacked.

    Lightning saves and loads the state of a training loader that has one. The order of the rows
    must be a function of the epoch, which Lightning tells the sampler: hence the sampler's type.
    Rows that are augmented at random are the same again only where the draws depend on the epoch
    and the row (see `AugmentedImages`), not on how many were made before.

    Args:
        dataset: Rows.
        batch_size: Rows per batch and process; None where an item of the dataset is a whole batch.
        sampler: The order of the rows, or of the batches.
        **kwargs: As for `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None,
        *,
        sampler: ResumableSampler,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        self._place = (0, 0)  # epoch, and batches of it that were taken
        self._resumed = (0, 0)

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

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were taken; equal on every rank."""
        epoch, taken = self._place
        return {"epoch": epoch, "taken": taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called."""
        self._place = self._resumed = (state["epoch"], state["taken"])
