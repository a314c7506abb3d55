"""Write what was collected as CSV files that no spreadsheet runs, and as Parquet."""

import csv
import importlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from saflex_lightning.data.cells import as_cell

__all__ = [
    "CLASSES",
    "DOUBTED",
    "GROUPS",
    "HISTORY",
    "ROWS",
    "as_cells",
    "write_parquet",
    "write_table",
]

ROWS = "saflex_rows.csv"
GROUPS = "saflex_groups.csv"
CLASSES = "saflex_classes.csv"
HISTORY = "saflex_history.csv"
DOUBTED = "saflex_doubted.png"


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows in the place of what is there; None becomes an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(map(as_cells, rows))
    unfinished.replace(path)


def write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as Parquet where pyarrow is installed; texts stay as they are."""
    with suppress(ImportError):
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
        values: list[Any] = list(zip(*rows, strict=True)) or [()] * len(columns)
        parquet.write_table(
            arrow.table({name: list(column) for name, column in zip(columns, values, strict=True)}),
            path,
        )


def as_cells(row: Sequence[Any]) -> list[Any]:
    """Return what a row of a CSV file holds; None becomes an empty cell."""
    return [_cell(value) for value in row]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return as_cell(value) if isinstance(value, str) else value
