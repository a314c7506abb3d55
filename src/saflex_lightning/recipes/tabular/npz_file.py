"""Read a table from a NumPy archive."""

from pathlib import Path

import numpy as np

from saflex_lightning.data.files import read_arrays
from saflex_lightning.recipes.tabular.table import Table

__all__ = ["read_npz"]

_ADVICE = "Write the file again with `numpy.savez_compressed`."
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
    arrays = read_arrays(file, KEYS, _ADVICE)
    rows = len(arrays["x_num"]) if arrays["x_num"].ndim else 0
    numeric_names, categorical_names = (
        _names(file, key, arrays[key]) for key in ("num_names", "cat_names")
    )
    keys = [f"levels_{name}" for name in categorical_names]
    found = read_arrays(file, keys, _ADVICE)
    levels = tuple(_names(file, key, found[key]) for key in keys)
    classes = _names(file, "classes", arrays["classes"])
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


def _names(file: Path, key: str, array: np.ndarray) -> tuple[str, ...]:
    try:
        names = tuple(array.astype(np.str_).reshape(-1).tolist())
    except ValueError:  # bytes that are no ASCII
        names = ("",)
    if "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected `{key}` of {file} to be names, each another one, but got {array.tolist()}. "
            f"{_ADVICE}"
        )
    return names
