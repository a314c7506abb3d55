"""A table with roles for its columns, whatever file it came from."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

__all__ = [
    "Table",
    "TabularInputs",
    "drop_duplicates",
    "split_rows",
]

PARTS = (0.65, 0.15)  # of the rows, for training and validation; the rest tests


class TabularInputs(NamedTuple):
    """Model inputs; a tuple, so that both parts reach ``forward`` as arguments of their own.

    Attributes:
        numeric: ``(batch, numeric columns)`` float32, standardised.
        categorical: ``(batch, categorical columns)`` int64 codes; 0 means missing, 1 a level that
            no training row has.
    """

    numeric: Tensor
    categorical: Tensor


class Table(NamedTuple):
    """Rows as they stand in a file: nothing scaled, imputed or recoded by frequency.

    Attributes:
        numeric: ``(n, numeric columns)`` float64; NaN means missing.
        categorical: ``(n, categorical columns)`` int64 positions in ``levels``; -1 means missing.
        target: ``(n,)`` int64 positions in ``classes``.
        numeric_names: Names of the numeric columns.
        categorical_names: Names of the categorical columns.
        levels: The levels of each categorical column.
        classes: Names of the classes.
    """

    numeric: np.ndarray
    categorical: np.ndarray
    target: np.ndarray
    numeric_names: tuple[str, ...]
    categorical_names: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    @property
    def cardinalities(self) -> list[int]:
        """Number of codes of each categorical column: its levels, missing, and unseen."""
        return [len(levels) + 2 for levels in self.levels]

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Rows of each class."""
        return tuple(np.bincount(self.target, minlength=len(self.classes)).tolist())

    def take(self, rows: np.ndarray | Tensor) -> "Table":
        """Return some rows, by number, in the order asked for."""
        numbers = np.asarray(rows)
        return self._replace(
            numeric=self.numeric[numbers],
            categorical=self.categorical[numbers],
            target=self.target[numbers],
        )

    def join(self, other: "Table") -> "Table":
        """Return these rows and those of another part of the same file behind them."""
        return self._replace(
            numeric=np.concatenate([self.numeric, other.numeric]),
            categorical=np.concatenate([self.categorical, other.categorical]),
            target=np.concatenate([self.target, other.target]),
        )


def drop_duplicates(table: Table) -> Table:
    """Return the first of all rows that agree in every column and in the label.

    Otherwise a random split puts copies of a training row into the test rows; in the 10 % file of
    KDD Cup 1999 seven rows of ten are copies.

    Args:
        table: The table; missing cells count as equal.
    """
    cells = np.column_stack([table.numeric + 0.0, table.categorical, table.target])  # no -0.0
    cells[np.isnan(cells)] = np.nan  # one bit pattern for all of them
    rows = np.ascontiguousarray(cells).view(f"V{cells.shape[1] * cells.itemsize}").reshape(-1)
    first = np.unique(rows, return_index=True)[1]
    return table.take(np.sort(first))


def split_rows(table: Table, *, seed: int, stratified: bool) -> tuple[Table, Table, Table]:
    """Return training, validation and test rows: 65, 15 and 20 %, drawn by seed.

    Args:
        table: The table.
        seed: Seed of the draw.
        stratified: Split every class by itself, for classes with few rows.

    Raises:
        ValueError: If there is one class alone, or a part misses one.
    """
    if len(table.classes) < 2:
        raise ValueError(
            f"Expected a table of two classes or more, but got {list(table.classes)}. Name the "
            "column of the labels as `target`."
        )
    generator = np.random.default_rng(seed)
    strata = table.target if stratified else np.zeros_like(table.target)
    parts: list[list[np.ndarray]] = [[], [], []]
    for stratum in np.unique(strata):
        rows = generator.permutation(np.flatnonzero(strata == stratum))
        ends = [round(share * len(rows)) for share in np.cumsum(PARTS)]
        for part, chosen in zip(parts, np.split(rows, ends), strict=True):
            part.append(chosen)
    tables = [table.take(np.sort(np.concatenate(part))) for part in parts]
    for name, part in zip(("training", "validation", "test"), tables, strict=True):
        if 0 in part.class_counts:
            missing = table.classes[part.class_counts.index(0)]
            raise ValueError(
                f"Expected the {name} rows to hold every class, but none of the {len(part.target)} "
                f"is of class '{missing}' ({table.class_counts[table.classes.index(missing)]} rows "
                f"in all). "
                + (
                    "Leave the class out, or give it more rows."
                    if stratified
                    else "Pass `stratified`=True to split every class by itself."
                )
            )
    return tables[0], tables[1], tables[2]
