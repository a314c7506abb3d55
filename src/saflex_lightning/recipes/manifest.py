"""The manifest of a pool: a CSV file that says what made each image and from what."""

import csv
from pathlib import Path
from typing import NamedTuple

from saflex_lightning.data.cells import as_cell, from_cell
from saflex_lightning.data.files import read_records

__all__ = [
    "COLUMNS",
    "MANIFEST",
    "PoolRow",
    "add_row",
    "as_cell",
    "check_generator",
    "from_cell",
    "read_listed",
    "read_manifest",
]

MANIFEST = "manifest.csv"


class PoolRow(NamedTuple):
    """One generated image, as a row of the manifest has it.

    Attributes:
        file: Path below the pool's folder.
        label: Name of its class; the column is called ``class``.
        source: The training image it was made from: a path below the folder of training images,
            or the number of the image (see `ClassFolders`); empty where there is none.
        generator: What made it.
        prompt: With which words; ``{class}`` may stand for the class name.
    """

    file: str
    label: str
    source: str
    generator: str
    prompt: str


COLUMNS = ("file", "class", *PoolRow._fields[2:])


def read_manifest(manifest: Path) -> list[tuple[int, PoolRow]]:
    """Return the rows of a manifest, each with the number of its line.

    Args:
        manifest: A CSV file with the columns `COLUMNS`.

    Raises:
        ValueError: If it is not, or its last line has no end.
    """
    advice = "Add them; `source` may be left empty for images that were not made from one."
    records = read_records(manifest, COLUMNS, advice)
    if not manifest.read_bytes().endswith((b"\n", b"\r")):
        raise ValueError(
            f"Expected the last line of {manifest} to end with a line break, but it does not: it "
            "may be cut short. Compare it with its image and add the break, or remove the line."
        )
    return [
        (line, PoolRow(*(from_cell(record[column]) for column in COLUMNS)))
        for line, record in records
    ]


def check_generator(name: str, beginning: str) -> None:
    """Refuse a generator without a name, or with that of the rows that are not augmented."""
    if name in {"", "clean"}:
        raise ValueError(
            f"Expected {beginning} a name other than 'clean', which stands for rows that none "
            f"made, but got '{name}'. Give it another name."
        )


def read_listed(manifest: Path) -> set[str]:
    """Return the files that a manifest lists, to which rows are to be added; none where it is not.

    Raises:
        ValueError: If it cannot be read, or its columns have another order.
    """
    if not manifest.is_file():
        return set()
    with manifest.open(encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline().strip()
    if header != ",".join(COLUMNS):  # rows that are added have that order
        raise ValueError(
            f"Expected the columns of {manifest} to be {list(COLUMNS)} in this order, to add rows, "
            f"but it begins with {header!r}. Make the pool in a folder of its own."
        )
    return {row.file for _, row in read_manifest(manifest)}


def add_row(manifest: Path, row: PoolRow, listed: set[str]) -> None:
    """Add a row, unless it is among the files that are listed, and its file to these."""
    if row.file in listed:
        return
    is_new = not manifest.is_file()
    with manifest.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(map(as_cell, row))
    listed.add(row.file)
