"""A pool of generated images: what each one shows, what made it and from which training image."""

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saflex_lightning.recipes.folders import ClassFolders, find_images
from saflex_lightning.recipes.manifest import MANIFEST, PoolRow, check_generator, read_manifest

__all__ = ["Pool", "draw_pool", "read_pool"]

_SOURCE_IN_NAME = re.compile(r"(\d+)-\d+")


class Pool(NamedTuple):
    """A pool of generated images.

    Attributes:
        files: Paths, in the order of the manifest or sorted.
        target: Labels, ``(n,)`` int64.
        source: Number of the training image each was made from, ``(n,)`` int64; -1 for none.
        group: What made it, ``(n,)`` int64 from 1.
        group_names: What each group stands for; the first is ``"clean"``.
    """

    files: list[Path]
    target: Tensor
    source: Tensor
    group: Tensor
    group_names: tuple[str, ...]


def read_pool(
    root: Path,
    train: ClassFolders,
    *,
    has_sources: bool = True,
    group_by: Literal["prompt", "generator"] = "prompt",
    allow_outside: bool = False,
) -> Pool:
    """Read a pool of generated images and check it against the training images.

    With a file ``{root}/manifest.csv``, the pool is the images that it lists; its columns are
    ``file``, ``class``, ``source``, ``generator`` and ``prompt``. Otherwise it is every image in
    ``{root}/.../{class}/{source}-{k}.png``: the folders between tell the prompt (and the strength
    and guidance), ``source`` is the number of the training image.

    Args:
        root: Folder of the pool.
        train: Training images.
        has_sources: Whether the images were made from training images. If so, each must name its
            source; if not (Text2Img), none is looked for.
        group_by: What a group is: one prompt of one generator, or one generator. Without a
            manifest the whole folder is one generator.
        allow_outside: Whether files may lie outside of the folder, by links or by their paths.

    Raises:
        FileNotFoundError: If there is no such folder, or a listed file is missing.
        ValueError: If the pool is empty, the manifest cannot be read, a file is listed twice or
            outside of the folder, or a row has an unknown class, no generator, no source, or a
            source of another class.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"Expected a folder of generated images at {root}, but there is none. Make it with "
            "`saflex-generate`, or pass another folder as `generated`."
        )
    manifest = root / MANIFEST
    if manifest.is_file():
        listed = [
            (f"{root / row.file} (line {line} of {manifest})", row)
            for line, row in read_manifest(manifest)
        ]
    else:
        listed = [(str(root / row.file), row) for row in _read_folders(root)]
    if not listed:
        raise ValueError(
            f"Expected generated images in {root}, but there are none. Make them with "
            "`saflex-generate`, or pass another folder as `generated`."
        )
    for where, row in listed:
        check_generator(row.generator, f"{where} to have a generator with")
    names = [_group_name(row, group_by) for _, row in listed]
    group_names = ("clean", *sorted(set(names)))
    numbers = {name: number for number, name in enumerate(group_names)}
    target = [_find_label(where, row, train) for where, row in listed]
    _check_files(listed, root, allow_outside=allow_outside)
    source = [-1] * len(listed)
    if has_sources:
        known = {file.relative_to(train.root).as_posix(): i for i, file in enumerate(train.files)}
        source = [
            _find_source(where, row, label, train, known)
            for (where, row), label in zip(listed, target, strict=True)
        ]
    return Pool(
        files=[root / row.file for _, row in listed],
        target=torch.tensor(target),
        source=torch.tensor(source),
        group=torch.tensor([numbers[name] for name in names]),
        group_names=group_names,
    )


def draw_pool(pool: Pool, wanted: Tensor, *, usable: Tensor, seed: int) -> Tensor:
    """Draw so many generated images of each class.

    One image of each source comes before the second one of any.

    Args:
        pool: The pool.
        wanted: How many of each class, ``(classes,)`` int64; all there are where it is more.
        usable: False for images that must not be drawn, ``(n,)`` bool.
        seed: Seed of the draw.

    Returns:
        Sorted positions in the pool.

    Example:
        >>> pool = Pool([], torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 7]), *2 * [None])
        >>> drawn = draw_pool(pool, torch.tensor([2, 1]), usable=torch.ones(4).bool(), seed=0)
        >>> sorted(pool.source[drawn].tolist())
        [5, 6, 7]
    """
    order = torch.randperm(len(pool.target), generator=torch.Generator().manual_seed(seed))
    seen: dict[int, int] = {}
    turns = []
    for source in pool.source[order].tolist():
        turns.append(seen.get(source, 0) if source >= 0 else 0)
        seen[source] = turns[-1] + 1
    order = order[torch.tensor(turns).argsort(stable=True)]
    order = order[usable[order]]
    drawn = [
        order[pool.target[order] == label][:number] for label, number in enumerate(wanted.tolist())
    ]
    return torch.cat(drawn).sort().values


def _read_folders(root: Path) -> list[PoolRow]:
    rows = []
    for path in sorted(find_images(root)):
        file = path.relative_to(root)
        *settings, label = file.parts[:-1] or [""]
        match = _SOURCE_IN_NAME.fullmatch(path.stem)
        source = match.group(1) if match else ""
        generator = root.resolve().name
        rows.append(PoolRow(file.as_posix(), label, source, generator, "/".join(settings)))
    return rows


def _group_name(row: PoolRow, group_by: Literal["prompt", "generator"]) -> str:
    if group_by == "generator":
        return row.generator
    return f"{row.generator}: {row.prompt}" if row.prompt else row.generator


def _find_label(where: str, row: PoolRow, train: ClassFolders) -> int:
    if row.label not in train.classes:
        raise ValueError(
            f"Expected the class of {where} to be one of {train.classes}, but got '{row.label}'. "
            "Rename it to the class folder of the training images, or remove the image."
        )
    return train.classes.index(row.label)


def _check_files(listed: list[tuple[str, PoolRow]], root: Path, *, allow_outside: bool) -> None:
    """Refuse files that are not there, are there twice, or lie outside of the folder."""
    home = os.path.realpath(root)
    seen: dict[str, str] = {}
    for where, row in listed:
        file = os.path.realpath(root / row.file)
        if not os.path.isfile(file):
            raise FileNotFoundError(
                f"Expected every file of the pool that is listed, but there is no {where}. Make it "
                "again, or remove its row."
            )
        if not allow_outside and os.path.commonpath([home, file]) != home:
            raise ValueError(
                f"Expected the files of the pool to lie in {home}, but {where} is {file}. Copy it "
                "into the folder, or set `allow_outside` to true where you know what it is."
            )
        if file in seen:
            raise ValueError(
                f"Expected every image of the pool once, but {where} is {seen[file]} again. Remove "
                "one of them."
            )
        seen[file] = where


def _find_source(
    where: str, row: PoolRow, label: int, train: ClassFolders, numbers: dict[str, int]
) -> int:
    if not row.source:
        raise ValueError(
            f"Expected {where} to say from which training image it was made, but it does not. Name "
            "it SOURCE-K.png with the number of the image, fill in the column `source` of "
            f"{MANIFEST}, or set `has_sources` to false for images made from text alone."
        )
    number = numbers.get(row.source)
    if number is None and row.source.isdecimal() and len(row.source) < 10:
        number = int(row.source)
    if number is None or number >= len(train.files):
        raise ValueError(
            f"Expected {where} to be made from a training image, but its source '{row.source}' is "
            f"neither a file below {train.root} nor the number of one of its {len(train.files)} "
            "images. Give the folder of training images that the pool was made from."
        )
    if train.target[number] != label:
        raise ValueError(
            f"Expected {where} to show the class of its source, but image {number} of "
            f"{train.root}, {train.files[number].name}, is of class "
            f"'{train.classes[int(train.target[number])]}' and not of '{row.label}'. Give the "
            "folder of training images that the pool was made from, with the same files."
        )
    return number
