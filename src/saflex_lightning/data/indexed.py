"""A dataset whose rows say which ones they are, for rows that stand alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from saflex_lightning.batch import AugmentedBatch

from .checks import check
from .resumable import check_dataset

__all__ = ["IndexedDataset", "IndexedRow", "with_index"]


class IndexedRow(NamedTuple):
    """A row of a dataset, and which one it is."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    pair: tuple[Any, Any]


class IndexedDataset(Dataset[IndexedRow]):
    """Rows of a dataset with their numbers, and `collate`, which makes batches of them."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> IndexedRow:
        pair = self.dataset[row]
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"Expected `dataset` to yield (input, label), but row {row} is a "
                f"{type(pair).__name__}. Wrap the dataset in one that does."
            )
        return IndexedRow(int(row), (pair[0], pair[1]))

    def collate(self, rows: list[IndexedRow]) -> AugmentedBatch:
        """Return a batch whose rows all count as augmented, and say which ones they are.

        Args:
            rows: Items of this dataset.
        """
        inputs, target = self.collate_fn([row.pair for row in rows])
        index = torch.tensor([row.index for row in rows])
        return AugmentedBatch(inputs, target, torch.ones(len(rows), dtype=torch.bool), index=index)


def with_index(
    dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None
) -> IndexedDataset:
    """Return a dataset whose rows are remembered over epochs: by `SAflexCallback`, in its tables.

    Every row may be a wrong one, and is weighed. A training step that unpacks ``inputs, target =
    batch`` stays as it is::

        rows = with_index(dataset)
        train_loader = DataLoader(rows, batch_size=64, shuffle=True, collate_fn=rows.collate)

    Args:
        dataset: Map-style, yields ``(input, label)``.
        collate_fn: From ``(input, label)`` pairs to batched inputs and labels; None is torch's.

    Returns:
        A dataset of the same length, with a method ``collate``.

    Raises:
        TypeError: If an argument is of another type.

    Example:
        >>> rows = with_index([(torch.ones(3), 0), (torch.zeros(3), 1)])
        >>> rows.collate([rows[1], rows[0]]).index
        tensor([1, 0])
    """
    check_dataset(dataset)
    check("a function", optional=True, collate_fn=collate_fn)
    return IndexedDataset(dataset, collate_fn or default_collate)
