"""Read a table from a CSV file whose columns have roles."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saflex_lightning.recipes.tabular.table import Table

__all__ = ["Roles", "read_csv"]

MISSING = frozenset({"", "?", "NA", "N/A", "NaN", "nan", "NULL", "null"})


class Roles(NamedTuple):
    """What the columns of a CSV file are for; columns without a role are left out.

    Attributes:
        target: The column to predict.
        categorical: Columns of levels.
        numeric: Columns of numbers; None means all that have no other role.
    """

    target: str
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] | None = None


def read_csv(file: Path, roles: Roles) -> Table:
    """Return the table of a comma-separated file with a header line.

    An empty cell, ``?``, ``NA``, ``N/A``, ``NaN`` or ``NULL`` is missing. Levels and classes are
    sorted, as numbers where all of them are numbers.

    Args:
        file: The file, UTF-8.
        roles: Roles of its columns, by name.

    Raises:
        ValueError: If a column is missing or has two roles, a line has another number of cells, a
            number cannot be read, or the target is missing somewhere.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        numeric_names = _check_columns(file, header, roles)
        numbers, words = _read_cells(
            file,
            reader,
            numeric=[header.index(name) for name in numeric_names],
            words=[header.index(name) for name in (*roles.categorical, roles.target)],
            header=header,
        )
    *categorical, target = words
    if not target:
        raise ValueError(f"Expected {file} to hold rows below its header, but it has none.")
    columns = [_encode(column) for column in categorical]
    codes, classes = _encode(target)
    if (codes < 0).any():
        row = int((codes < 0).argmax()) + 1
        raise ValueError(
            f"Expected every row of {file} to have a target, but column '{roles.target}' of row "
            f"{row} is missing. Remove rows without a label."
        )
    return Table(
        numeric=np.array(numbers, np.float64).reshape(len(target), len(numeric_names)),
        categorical=np.array([c for c, _ in columns], np.int64).reshape(-1, len(target)).T,
        target=codes,
        numeric_names=numeric_names,
        categorical_names=roles.categorical,
        levels=tuple(levels for _, levels in columns),
        classes=classes,
    )


def _check_columns(file: Path, header: list[str], roles: Roles) -> tuple[str, ...]:
    """Return the numeric columns, after checking that every role names one column."""
    given = [roles.target, *roles.categorical, *(roles.numeric or ())]
    if absent := [name for name in given if name not in header]:
        raise ValueError(
            f"Expected {file} to have the columns {sorted(given)}, but {absent} are not among its "
            f"columns {header}. Correct the names in `target`, `categorical` and `numeric`."
        )
    numeric = roles.numeric
    if numeric is None:
        numeric = tuple(name for name in header if name not in given)
    places = [roles.target, *roles.categorical, *numeric, *header]
    if twice := sorted({name for name in places if places.count(name) > 2}):
        raise ValueError(
            f"Expected every column to have one name and one role, but {twice} of {file} have "
            "more. Name each column once in the file and in `target`, `categorical` and `numeric`."
        )
    return numeric


def _read_cells(
    file: Path,
    lines: Iterator[list[str]],
    *,
    numeric: list[int],
    words: list[int],
    header: list[str],
) -> tuple["array[float]", list[list[str]]]:
    """Return all numbers, row by row, and the columns of words."""
    numbers, columns = array("d"), [[] for _ in words]
    for row, cells in enumerate(lines, start=1):
        if not cells:
            continue  # an empty line, mostly the last
        if len(cells) != len(header):
            raise ValueError(
                f"Expected {len(header)} cells in every row of {file}, as in its header, but row "
                f"{row} has {len(cells)}. Quote cells that hold commas."
            )
        cells = [cell.strip() for cell in cells]
        for place in numeric:
            try:
                number = float("nan" if cells[place] in MISSING else cells[place])
            except ValueError:
                number = float("inf")
            if abs(number) == float("inf"):
                raise ValueError(
                    f"Expected finite numbers in column '{header[place]}' of {file}, but row {row} "
                    f"has {cells[place]!r}. Give the column the role `categorical`, or leave the "
                    "cell empty where it is missing."
                )
            numbers.append(number)
        for column, place in zip(columns, words, strict=True):
            column.append(cells[place])
    return numbers, columns


def _encode(column: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the position of every cell among the sorted levels (-1: missing), and the levels."""
    found = set(column) - MISSING
    try:
        levels = sorted(found, key=lambda level: (float(level), level))
    except ValueError:
        levels = sorted(found)
    codes = {level: code for code, level in enumerate(levels)}
    return np.array([codes.get(cell, -1) for cell in column], np.int64), tuple(levels)
