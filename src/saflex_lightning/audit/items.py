"""Items whose labels are judged or trusted: images in folders or a manifest, or rows of a table."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from saflex_lightning.data.cells import from_cell
from saflex_lightning.data.files import read_records
from saflex_lightning.recipes.folders import FileImages, read_class_folders
from saflex_lightning.recipes.images import normalize
from saflex_lightning.recipes.manifest import MANIFEST
from saflex_lightning.recipes.tabular.table import Table, TabularInputs

__all__ = ["ImageInputs", "Items", "TableInputs", "fit_columns", "fit_labels", "read_images"]


class ImageInputs(Sequence[Tensor]):
    """Images as a network takes them.

    Args:
        images: `FileImages`, or ``(n, channels, height, width)`` uint8.
        shape: Channels (1 for grey images, 3 for colour), height and width.
    """

    def __init__(self, images: Any, shape: Sequence[int]) -> None:
        self.images = images
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:  # type: ignore[override]  no slices here
        """Return an image, ``(channels, height, width)`` float32; NaN where it cannot be read."""
        try:
            image = self.images[row]
        except ValueError:
            return torch.full(self.shape, torch.nan)
        if len(image) != self.shape[0]:
            is_grey = self.shape[0] == 1
            image = F.rgb_to_grayscale(image) if is_grey else image.expand(3, -1, -1)
        fits = image.shape == self.shape
        return normalize(image if fits else F.resize(image, list(self.shape[1:])))

    def content(self) -> Iterator[Any]:
        """Yield what tells the images from others; of files the size and the time of change."""
        if isinstance(self.images, Tensor):
            yield self.images
            return
        for file in self.images.files:
            facts = file.stat() if file.is_file() else None
            yield str(facts and (facts.st_size, facts.st_mtime_ns))


class TableInputs(Sequence[TabularInputs]):
    """Rows of a table as a network takes them."""

    def __init__(self, inputs: TabularInputs) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs.numeric)

    def __getitem__(self, row: int) -> TabularInputs:  # type: ignore[override]  no slices here
        return TabularInputs(*(part[row] for part in self.inputs))

    def content(self) -> Iterator[Any]:
        """Yield what tells the rows from others."""
        yield from self.inputs


class Items(NamedTuple):
    """Items with labels.

    Attributes:
        names: What each is called: its file, or the number of its row.
        target: Position of its label in ``classes``, ``(n,)`` int64.
        classes: Names of the classes.
        inputs: What a network takes of each.
    """

    names: Sequence[str]
    target: Tensor
    classes: Sequence[str]
    inputs: ImageInputs | TableInputs

    def fingerprint(self) -> str:
        """Return what tells these items from others."""
        found = hashlib.sha256()
        for part in chain(self.names, self.classes, [self.target], self.inputs.content()):
            found.update(part.encode() if isinstance(part, str) else np.asarray(part).tobytes())
            found.update(b"\0")
        return found.hexdigest()

    def check_readable(self, row: int, *, is_readable: bool) -> None:
        """Refuse a trusted item that has no scores."""
        if not is_readable:
            raise ValueError(
                f"Expected trusted items that can be read, with finite scores, but "
                f"'{self.names[row]}' is not. Mend it or leave it out; where none is, the network "
                "has diverged: take another checkpoint."
            )


def read_images(path: Path, shape: Sequence[int]) -> Items:
    """Return images by their class folders, or as a manifest lists them.

    Args:
        path: A folder of class folders, or with ``manifest.csv``; or such a file, of which the
            columns ``file`` (below its folder) and ``class`` are read.
        shape: Of what the network takes: channels, height and width.

    Raises:
        ValueError: If there is no image, or the manifest lacks a column.
    """
    manifest = path / MANIFEST if path.is_dir() else path
    if manifest.is_file():
        advice = "Add them, or name the labels' column by `--target` if this is a table."
        records = [record for _, record in read_records(manifest, ("file", "class"), advice)]
        files = [manifest.parent / from_cell(record["file"]) for record in records]
        labels = [from_cell(record["class"]) for record in records]
        classes = sorted(set(labels))
        target = torch.tensor([classes.index(label) for label in labels], dtype=torch.int64)
    else:
        _, files, target, classes = read_class_folders(path)
    if not files:
        raise ValueError(
            f"Expected images in {path}, but there is none. Give a folder with one folder of "
            "images for each class, or a manifest with the columns `file` and `class`."
        )
    names = [os.path.relpath(file, manifest.parent) for file in files]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Expected file names in UTF-8, but got {name!r} in {path}. Rename the file."
            ) from error
    return Items(names, target, classes, ImageInputs(FileImages(files, shape[1:]), shape))


def fit_labels(items: Items, classes: Sequence[str], path: Path) -> Items:
    """Return items with their labels as positions in the trusted items' classes.

    Raises:
        ValueError: If a class is unknown.
    """
    if unknown := sorted(set(items.classes) - set(classes)):
        raise ValueError(
            f"Expected the classes of {path} to be among those of the trusted items, "
            f"{list(classes)}, but {unknown} are not. Rename them, or add trusted items of these "
            "classes."
        )
    places = torch.tensor([classes.index(name) for name in items.classes])
    return items._replace(target=places[items.target], classes=classes)


def fit_columns(table: Table, like: Table, path: Path) -> Table:
    """Return a table with the columns and the levels of another one.

    Raises:
        ValueError: If its columns are others.
    """
    for kind in ("numeric", "categorical"):
        found, wanted = (getattr(each, f"{kind}_names") for each in (table, like))
        if set(found) != set(wanted):
            raise ValueError(
                f"Expected the {kind} columns of {path} to be {list(wanted)}, as those that it is "
                f"judged with, but got {list(found)}. Correct its header, or name the columns by "
                "`--numeric` and `--categorical`."
            )
    numbers = [table.numeric_names.index(name) for name in like.numeric_names]
    columns = [table.categorical_names.index(name) for name in like.categorical_names]
    codes = table.categorical[:, columns].copy()
    for place, (column, levels) in enumerate(zip(columns, like.levels, strict=True)):
        known = {level: code for code, level in enumerate(levels)}
        # A level that the other table has not lies beyond; -1, for missing, reads the last entry.
        places = np.array([*(known.get(own, len(levels)) for own in table.levels[column]), -1])
        codes[:, place] = places[codes[:, place]]
    return table._replace(
        numeric=table.numeric[:, numbers],
        categorical=codes,
        numeric_names=like.numeric_names,
        categorical_names=like.categorical_names,
        levels=like.levels,
    )
