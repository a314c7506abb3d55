"""What an earlier run thought of its rows, for one that trains on all of them."""

import math
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .checks import check
from .files import read_records

__all__ = ["read_row_weights"]

_INDEX, _WEIGHT, _LABEL = "index", "mean_weight", "given"
_ADVICE = "Pass the saflex_rows.csv that `SAflexInsight` wrote."


def read_row_weights(
    file: str | PathLike[str],
    num_rows: int,
    *,
    first_index: int = 0,
    labels: Tensor | None = None,
) -> Tensor:
    """Return how much each row counted in an earlier run, from what `SAflexInsight` wrote of it.

    The validation rows of that run need not be held out in the next one, which is a plain one
    without the callback. It draws rows by their weight::

        weights = read_row_weights("first/saflex_rows.csv", len(train_rows))
        weights = torch.cat([weights, torch.ones(len(val_rows))])
        rows = ConcatDataset([train_rows, val_rows])
        loader = DataLoader(rows, 64, sampler=WeightedRandomSampler(weights, len(rows)))

    `union_loader` takes them as ``weights=weights``.

    Args:
        file: ``saflex_rows.csv``.
        num_rows: Rows of the dataset.
        first_index: Index of its first row: 0 after `with_index`; after `union_loader` the number
            of clean rows, since what was made of row i has this number more.
        labels: Class of each row, ``(num_rows,)`` integers, to refuse the file of other rows; None
            does not compare, as is right where an augmentation mixed the labels of that run.

    Returns:
        Mean weight over the visits of each row, the newest counting most, ``(num_rows,)``
        float64; 1 for a row that the file does not know.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument is of another type.
        ValueError: If it is no table of rows, or one of another dataset, by its indices or labels.
    """
    check("a path", file=file)
    check("a positive integer", num_rows=num_rows)
    check("a non-negative integer", first_index=first_index)
    check("a tensor of integers, (rows,)", optional=True, labels=labels)
    if labels is not None and len(labels) != num_rows:
        raise ValueError(
            f"Expected `labels` to hold the class of each of {num_rows} rows, but got "
            f"{len(labels)}. Pass those of all rows of the dataset."
        )
    path = Path(file)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"Expected `file` to be a table of rows, but {path} is {found}. {_ADVICE} It writes "
            "one where rows have an `index`, see `with_index`."
        )
    weights = torch.ones(num_rows, dtype=torch.float64)
    known, classes = set[int](), None if labels is None else labels.tolist()
    names, numbers = dict[int, str](), dict[str, int]()
    for line, cells in read_records(path, (_INDEX, _WEIGHT), _ADVICE):
        index, weight = _read(path, line, cells)
        row = index - first_index
        if not 0 <= row < num_rows:
            raise ValueError(
                f"Expected the rows of {path} to have indices from {first_index} to "
                f"{first_index + num_rows - 1}, but line {line} has {index}. Pass the length of "
                "the dataset of that run as `num_rows`, and the index of its first row as "
                "`first_index`."
            )
        if row in known:
            raise ValueError(
                f"Expected each row once in {path}, but line {line} has {index} again. {_ADVICE}"
            )
        known.add(row)
        weights[row] = weight
        given = cells.get(_LABEL, "")
        if classes is None or not given:
            continue
        label = classes[row]
        if names.setdefault(label, given) != given or numbers.setdefault(given, label) != label:
            raise ValueError(
                f"Expected the labels of {path} to be those of the rows, but line {line} has "
                f"{given!r} for row {row}, which is of class {label}, and earlier lines contradict "
                "that. Pass the file of a run on the same rows in the same order, with the same "
                "seed where wrong labels are planted. Labels that an augmentation mixed in that "
                "run cannot be compared."
            )
    return weights


def _read(path: Path, line: int, cells: dict[str, str]) -> tuple[int, float]:
    try:
        index, weight = int(cells[_INDEX]), float(cells[_WEIGHT])
    except ValueError:
        index, weight = 0, math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"Expected an integer and a finite weight of 0 or more in line {line} of {path}, but "
            f"got {cells[_INDEX]!r} and {cells[_WEIGHT]!r}. {_ADVICE}"
        )
    return index, weight
