"""Read a table from a CSV file whose columns have roles."""

import math
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saflex_lightning.data.files import read_rows, read_text
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
        ImportError: If pandas is not installed.
        ValueError: If a column is missing or has two roles, a line has another number of cells, a
            number cannot be read, or the target is missing somewhere.
    """
    text = read_text(file)
    rows = read_rows(file, text)
    header = [name.strip() for name in next(rows, (1, []))[1]]
    numeric = _check_columns(file, header, roles)
    # All lines are looked at here: pandas fills those up that are too short.
    lines = [line for line, _ in rows]
    if not lines:
        raise ValueError(f"Expected {file} to hold rows below its header, but it has none.")
    place = {name: number for number, name in enumerate(header)}
    cells = _split(text, len(header))
    numbers = _read_numbers(file, cells[:, [place[name] for name in numeric]], numeric, lines)
    words = (*roles.categorical, roles.target)
    *categorical, (target, classes) = [_encode(cells[:, place[name]]) for name in words]
    if (target < 0).any():
        raise ValueError(
            f"Expected every row of {file} to have a target, but column '{roles.target}' of line "
            f"{lines[int((target < 0).argmax())]} is missing. Remove rows without a label."
        )
    return Table(
        numeric=numbers,
        categorical=np.array([c for c, _ in categorical], np.int64).reshape(-1, len(target)).T,
        target=target,
        numeric_names=numeric,
        categorical_names=roles.categorical,
        levels=tuple(levels for _, levels in categorical),
        classes=classes,
    )


def _check_columns(file: Path, header: list[str], roles: Roles) -> tuple[str, ...]:
    """Return the numeric columns, after checking that every role names one column."""
    given = dict.fromkeys([roles.target, *roles.categorical, *(roles.numeric or ())])
    if absent := sorted(given.keys() - set(header)):
        shown = f"{header[:20]}{' and so on' * (len(header) > 20)}"
        raise ValueError(
            f"Expected {file} to have the columns {sorted(given)}, but {absent} are not among its "
            f"columns {shown}. Correct the names in `target`, `categorical` and `numeric`."
        )
    numeric = roles.numeric
    if numeric is None:
        numeric = tuple(name for name in header if name not in given)
    used = [roles.target, *roles.categorical, *numeric]
    places = Counter(used) + Counter(header)
    if odd := sorted({name for name in used if not name or places[name] > 2}):
        raise ValueError(
            f"Expected every column to have one name and one role, but {odd} of {file} have none "
            "or more. Name each column once in the file and in `target`, `categorical` and "
            "`numeric`."
        )
    if len(used) < 2:
        raise ValueError(
            f"Expected {file} to have a column beside '{roles.target}' to predict it from, but "
            "there is none. Name some as `categorical` or `numeric`."
        )
    return numeric


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "Expected pandas to read CSV files, but it is not installed. Run "
            "`pip install 'saflex-lightning[tabular]'`."
        ) from error
    return pandas


def _split(text: str, width: int) -> np.ndarray:
    """Return the cells below the header, ``(rows, width)`` text."""
    frame = _pandas().read_csv(
        StringIO(text),
        header=0,
        names=range(width),
        index_col=False,
        dtype=object,
        na_filter=False,
        skipinitialspace=True,
        low_memory=False,
    )
    return frame.to_numpy()


def _read_numbers(
    file: Path, cells: np.ndarray, names: Sequence[str], lines: list[int]
) -> np.ndarray:
    """Return numbers of the shape of the cells; NaN where one is missing."""
    codes, found = _pandas().factorize(cells.ravel())
    values = np.array([_as_number(cell) for cell in found], np.float64)
    if np.isinf(values).any():
        row, column = divmod(int(np.isinf(values)[codes].argmax()), len(names))
        raise ValueError(
            f"Expected finite numbers in column '{names[column]}' of {file}, but line {lines[row]} "
            f"has {cells[row, column][:50]!r}. Give the column the role `categorical`, or empty "
            "the cell where it is missing."
        )
    return values[codes].reshape(cells.shape)


def _as_number(cell: str) -> float:
    """Return NaN for a cell that is missing, and infinity for one that is no number."""
    if cell.strip() in MISSING:
        return math.nan
    try:
        return math.inf if "_" in cell else float(cell)  # Python reads 2024_01 as 202401
    except ValueError:
        return math.inf


def _encode(column: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the position of every cell among the sorted levels (-1: missing), and the levels."""
    codes, found = _pandas().factorize(column)
    cells = [cell.strip() for cell in found]
    levels = sorted(set(cells) - MISSING)
    if all(math.isfinite(_as_number(level)) for level in levels):
        levels.sort(key=_as_number)
    places = {level: place for place, level in enumerate(levels)}
    return np.array([places.get(cell, -1) for cell in cells], np.int64)[codes], tuple(levels)
