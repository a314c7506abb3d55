"""Read a table from a NumPy archive."""

import zipfile
from pathlib import Path

import numpy as np

from saflex_lightning.recipes.tabular.table import Table

__all__ = ["read_npz"]

KEYS = ("x_num", "num_names", "x_cat", "cat_names", "y", "classes")


def read_npz(file: Path) -> Table:
    """Return the table of a ``.npz`` file.

    Keys: ``x_num`` (n, numeric columns), ``num_names``, ``x_cat`` (n, categorical columns) integer
    codes, ``cat_names``, ``levels_<name>`` for each of them (code i is the i-th level, -1 is
    missing), ``y`` (n,) integers, ``classes``; further keys are not read.

    Args:
        file: The file.

    Raises:
        ValueError: If the file is no archive, a key is missing, or an array does not fit.
    """
    arrays = _load(file)
    rows = len(arrays["y"])
    numeric_names, categorical_names = _names(arrays["num_names"]), _names(arrays["cat_names"])
    levels = tuple(_names(arrays[f"levels_{name}"]) for name in categorical_names)
    classes = _names(arrays["classes"])
    numeric, categorical, target = arrays["x_num"], arrays["x_cat"], arrays["y"]
    shapes = {
        "x_num": (numeric, np.floating, (rows, len(numeric_names))),
        "x_cat": (categorical, np.integer, (rows, len(categorical_names))),
        "y": (target, np.integer, (rows,)),
    }
    for key, (array, kind, shape) in shapes.items():
        if array.shape != shape or not np.issubdtype(array.dtype, kind) or rows == 0:
            raise ValueError(
                f"Expected `{key}` of {file} to be {kind.__name__} numbers of shape {shape}, with "
                f"one row or more, but got {array.dtype} of shape {array.shape}. Write the file "
                "again."
            )
    if np.isinf(numeric).any():
        column = numeric_names[int(np.isinf(numeric).any(0).argmax())]
        raise ValueError(
            f"Expected finite numbers in {file}, but column '{column}' holds an infinite one. "
            "Replace it, or write NaN where a value is missing."
        )
    sizes = [len(column) for column in levels]
    columns = zip(categorical_names, categorical.T, sizes, [-1] * len(levels), strict=True)
    for name, codes, size, least in [*columns, ("y", target, len(classes), 0)]:
        if codes.min() < least or codes.max() >= size:
            raise ValueError(
                f"Expected the codes of '{name}' in {file} to be in [{least}, {size - 1}], but "
                f"they range from {codes.min()} to {codes.max()}. Write the file again, or "
                "add the names of the missing levels."
            )
    return Table(
        numeric=numeric.astype(np.float64),
        categorical=categorical.astype(np.int64),
        target=target.astype(np.int64),
        numeric_names=numeric_names,
        categorical_names=categorical_names,
        levels=levels,
        classes=classes,
    )


def _load(file: Path) -> dict[str, np.ndarray]:
    message = (
        f"Expected {file} to be a NumPy .npz archive without pickled objects, but it cannot be "
        "read as one. Write it again with `numpy.savez_compressed`."
    )
    with file.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(message) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(message)
        wanted = set(KEYS)
        if "cat_names" in archive.files:
            wanted |= {f"levels_{name}" for name in archive["cat_names"]}
        if missing := sorted(wanted - set(archive.files)):
            raise ValueError(
                f"Expected {file} to hold the keys {sorted(wanted)}, but {missing} are missing. "
                "Write the file again with them."
            )
        return {key: archive[key] for key in wanted}


def _names(array: np.ndarray) -> tuple[str, ...]:
    return tuple(str(name) for name in array.reshape(-1))
