"""Small tables for tests of the tabular recipes."""

import csv
from pathlib import Path

import numpy as np

from saflex_lightning.recipes.tabular.table import Table

SHARED = Path(__file__).parents[3] / "shared"
COLOURS, SIZES = ("blue", "green", "red"), ("large", "small")


def make_table(rows: int = 120, *, positives: int | None = None, seed: int = 0) -> Table:
    """Two numeric columns, two categorical ones, two classes that the first number tells apart."""
    generator = np.random.default_rng(seed)
    numeric = generator.normal(size=(rows, 2))
    target = (numeric[:, 0] > 0).astype(np.int64)
    if positives is not None:
        target = (np.arange(rows) < positives).astype(np.int64)
    sizes = (len(COLOURS), len(SIZES))
    return Table(
        numeric=numeric,
        categorical=np.column_stack([generator.integers(0, size, rows) for size in sizes]),
        target=target,
        numeric_names=("height", "weight"),
        categorical_names=("colour", "size"),
        levels=(COLOURS, SIZES),
        classes=("no", "yes"),
    )


def write_npz(path: Path, table: Table, *, leave_out: tuple[str, ...] = (), **replaced) -> Path:
    """Write a table in the layout of `read_npz`."""
    arrays = {
        "x_num": table.numeric,
        "num_names": np.array(table.numeric_names, dtype=np.str_),
        "x_cat": table.categorical.astype(np.int32),
        "cat_names": np.array(table.categorical_names, dtype=np.str_),
        "y": table.target,
        "classes": np.array(table.classes),
        **{
            f"levels_{name}": np.array(levels)
            for name, levels in zip(table.categorical_names, table.levels, strict=True)
        },
        **replaced,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if key not in leave_out})
    return path


def write_csv(path: Path, table: Table) -> Path:
    """Write a table as CSV, the target in a column named ``answer``."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*table.numeric_names, *table.categorical_names, "answer"])
        for numbers, codes, label in zip(
            table.numeric, table.categorical, table.target, strict=True
        ):
            words = [
                "" if c < 0 else names[c] for names, c in zip(table.levels, codes, strict=True)
            ]
            cells = ["" if np.isnan(number) else repr(float(number)) for number in numbers]
            writer.writerow([*cells, *words, table.classes[label]])
    return path
