"""CSV files and NumPy archives, read strictly: what is odd is told with its file and its line."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import numpy as np

__all__ = ["read_arrays", "read_records", "read_rows", "read_text"]


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, without the mark that may begin it.

    Raises:
        ValueError: If it is in another encoding, or there is a NUL byte.
    """
    content = file.read_bytes()
    place = content.find(b"\0")
    if place < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = error.start
    line = content.count(b"\n", 0, place) + 1
    raise ValueError(
        f"Expected {file} to be text in UTF-8, but line {line} is not. Save it as CSV in UTF-8."
    )


def read_rows(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line and the cells of every row, the header first.

    Args:
        file: Where the text is from.
        text: The text; blank lines are left out.

    Raises:
        ValueError: If a quotation mark is out of place, a cell has more than 128 KiB, or a row has
            another number of cells than the header.
    """
    reader = csv.reader(StringIO(text, newline=""), strict=True, skipinitialspace=True)
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"Expected {file} to be comma-separated, but line {line} cannot be read ({error}). "
                "Correct its quotation marks, or write the file again."
            ) from error
        width = width or len(cells)
        if len(cells) not in {0, width}:
            raise ValueError(
                f"Expected {width} cells in every row of {file}, as in its header, but line {line} "
                f"has {len(cells)}. Quote cells that hold commas, and remove a line that was cut "
                "short."
            )
        if cells:
            yield line, cells


def read_records(
    file: Path, columns: Sequence[str], advice: str
) -> list[tuple[int, dict[str, str]]]:
    """Return the number of the line and the cells by column, without spaces, of every row.

    Args:
        file: A CSV file with a header.
        columns: What it must have; there may be others.
        advice: What to do where one is missing.

    Raises:
        ValueError: If a column is missing or comes twice, or the file is none that `read_rows`
            reads.
    """
    header, *rows = list(read_rows(file, read_text(file))) or [(1, [])]
    names = [name.strip() for name in header[1]]
    if missing := sorted(set(columns) - set(names)):
        raise ValueError(
            f"Expected {file} to have the columns {list(columns)}, but {missing} are missing; it "
            f"has {names}. {advice}"
        )
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(
            f"Expected every column of {file} to have a name of its own, but {twice} come twice. "
            "Rename or remove one of them."
        )
    return [(line, dict(zip(names, map(str.strip, cells), strict=True))) for line, cells in rows]


def read_arrays(file: Path, keys: Sequence[str], advice: str) -> dict[str, np.ndarray]:
    """Return arrays of a ``.npz`` archive.

    Args:
        file: The archive.
        keys: Their names; there may be others.
        advice: What to do where one is missing or cannot be read.

    Raises:
        ValueError: If the file is no archive, or an array is missing or broken.
    """
    found: dict[str, np.ndarray] = {}
    key = ""
    try:
        with file.open("rb") as stream:  # NumPy leaves a file open that it cannot read
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            missing = sorted(set(keys) - set(archive.files))
            for key in sorted(set(keys) - set(missing)):
                found[key] = np.asarray(archive[key])
    except Exception as error:  # whatever NumPy and zip meet in a broken file
        what = f"`{key}` of {file} to be an array" if key else f"{file} to be a NumPy .npz archive"
        raise ValueError(
            f"Expected {what} without pickled objects, but it cannot be read as one ({error}). "
            f"{advice}"
        ) from error
    if missing:
        raise ValueError(
            f"Expected {file} to hold the keys {sorted(keys)}, but {missing} are missing. {advice}"
        )
    return found
