"""Images in class folders: listed and checked before training, read when they are needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

__all__ = ["ClassFolders", "FileImages", "check_images", "is_image", "read_class_folders"]


class ClassFolders(NamedTuple):
    """The images of one split.

    Attributes:
        root: Folder of the class folders.
        files: Paths, sorted by class and then by name: row i is what torchvision's ``ImageFolder``
            calls sample i.
        target: Position of each image's class in ``classes``, ``(n,)`` int64.
        classes: Names of the classes, sorted.
    """

    root: Path
    files: list[Path]
    target: Tensor
    classes: list[str]


class FileImages(Sequence[Tensor]):
    """Images that are read from their files when they are asked for.

    Args:
        files: Paths of the images.
        size: Side to resize to, in pixels; None keeps images as they are.
    """

    def __init__(self, files: Sequence[Path], size: int | None) -> None:
        self.files = files
        self.size = size

    def take(self, rows: Sequence[int]) -> "FileImages":
        """Return some of the images."""
        return FileImages([self.files[row] for row in rows], self.size)

    def join(self, other: "FileImages") -> "FileImages":
        """Return these images and others behind them."""
        return FileImages([*self.files, *other.files], self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:  # type: ignore[override]  no slices here
        """Return an image, ``(3, height, width)`` uint8.

        Raises:
            ValueError: If the file cannot be read.
        """
        try:
            with Image.open(self.files[row]) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise ValueError(_unreadable(self.files[row], error)) from error
        if self.size is not None:
            image = v2.functional.resize(image, [self.size, self.size])
        return v2.functional.pil_to_tensor(image)


def read_class_folders(
    folder: Path, classes: Sequence[str] | None = None, *, num_classes: int | None = None
) -> ClassFolders:
    """List the images of one split, ``{folder}/{class}/{image}``.

    Args:
        folder: Folder of the class folders.
        classes: Names the class folders must have, all of them; None takes the names found.
        num_classes: Number of class folders there must be; None skips the check.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If class folders are missing, unknown or without an image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected class folders in {folder}, but there is no such folder. Make one folder "
            "per class in it, with the images of that class."
        )
    found = sorted(child.name for child in folder.iterdir() if child.is_dir())
    if num_classes is not None and len(found) != num_classes:
        raise ValueError(
            f"Expected {num_classes} class folders in {folder}, but found {len(found)}. Correct "
            "the folders, or leave `num_classes` out."
        )
    classes = found if classes is None else list(classes)
    if missing := sorted(set(classes) - set(found)):
        raise ValueError(
            f"Expected {folder} to hold the same class folders as the training images, but "
            f"{missing} are missing. Add them, or take the class out of the training images."
        )
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(
            f"Expected {folder} to hold the same class folders as the training images, but "
            f"{unknown} are unknown. Rename or remove them."
        )
    files, target = [], []
    for label, name in enumerate(classes):
        images = sorted(path for path in (folder / name).rglob("*") if is_image(path))
        if not images:
            raise ValueError(
                f"Expected at least one image in {folder / name}, but there is none. Images end "
                f"in one of {sorted(IMG_EXTENSIONS)}."
            )
        files += images
        target += [label] * len(images)
    return ClassFolders(folder, files, torch.tensor(target), classes)


def is_image(path: Path) -> bool:
    """Say whether a file has an image's ending, ``.png`` or ``.jpg`` for instance."""
    return path.suffix.lower() in IMG_EXTENSIONS


def check_images(files: Sequence[Path], *, same_size: bool) -> None:
    """Look at the head of every file, without decoding it.

    Args:
        files: Paths.
        same_size: Whether all images must be as large as the first one.

    Raises:
        ValueError: If a file is not an image, or of another size.
    """
    size = None
    for file in files:
        try:
            with Image.open(file) as image:
                found = image.size
        except OSError as error:
            raise ValueError(_unreadable(file, error)) from error
        size = size or found
        if same_size and found != size:
            raise ValueError(
                f"Expected images of {size[0]}x{size[1]} pixels, as {files[0]} has, but {file} has "
                f"{found[0]}x{found[1]}. Set `image_size` to resize all of them, or make it again."
            )


def _unreadable(file: Path, error: Exception) -> str:
    return (
        f"Expected {file} to be an image, but it cannot be read ({error}). Make or download it "
        "again, or remove it."
    )
