"""Images in class folders: listed and checked before training, read when they are needed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

__all__ = ["ClassFolders", "FileImages", "check_images", "find_images", "read_class_folders"]

# Kinds of pixels of 8 bits; others, of 16 bits or floats, have no scale that all files share.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}


class ClassFolders(NamedTuple):
    """The images of one split.

    Attributes:
        root: Folder of the class folders.
        files: Paths, class by class: row i is what torchvision's ``ImageFolder`` calls sample i.
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
        size: Side, or height and width, to resize to, in pixels; None keeps images as they are.
    """

    def __init__(self, files: Sequence[Path], size: int | Sequence[int] | None) -> None:
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
        with _opened(self.files[row]) as opened:
            image: Any = opened.convert("RGB")
        if self.size is not None:
            sides = [self.size] * 2 if isinstance(self.size, int) else list(self.size)
            image = v2.functional.resize(image, sides)
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
        ValueError: If class folders are missing, unknown or without an image, or a file stands in
            two of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected class folders in {folder}, but there is no such folder. Make one folder "
            "per class in it, with the images of that class, or correct `root` or `train`."
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
    labels: dict[str, int] = {}
    for label, name in enumerate(classes):
        images = find_images(folder / name)
        if not images:
            raise ValueError(
                f"Expected at least one image in {folder / name}, but there is none. Images end "
                f"in one of {sorted(IMG_EXTENSIONS)}."
            )
        for file in images:
            other = labels.setdefault(os.path.realpath(file), label)
            if other != label:
                raise ValueError(
                    f"Expected every image to stand in one class, but {file} is an image of class "
                    f"'{classes[other]}' too. Remove one of the links."
                )
        files += images
        target += [label] * len(images)
    return ClassFolders(folder, files, torch.tensor(target), classes)


def find_images(folder: Path) -> list[Path]:
    """Return the images in a folder and below, as torchvision finds them: links are followed."""
    found = make_dataset(folder.parent, {folder.name: 0}, IMG_EXTENSIONS, allow_empty=True)
    return [Path(file) for file, _ in found]


def check_images(files: Sequence[Path], *, same_size: bool) -> None:
    """Look at the head of every file, without decoding it.

    Args:
        files: Paths.
        same_size: Whether all images must be as large as the first one.

    Raises:
        ValueError: If a file is not an image of 8 bits, or of another size.
    """
    size = None
    for file in files:
        with _opened(file) as image:
            found = image.size
        size = size or found
        if same_size and found != size:
            raise ValueError(
                f"Expected images of {size[0]}x{size[1]} pixels, as {files[0]} has, but {file} has "
                f"{found[0]}x{found[1]}. Set `image_size` to resize all of them, or make it again."
            )


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image of 8 bits; whatever goes wrong meanwhile is told with the file's name."""
    try:
        with Image.open(file) as image:
            if image.mode not in _MODES:
                raise ValueError(f"its mode {image.mode} is not of 8 bits: scale it to 0 to 255")
            yield image
    except Exception as error:  # Pillow raises whatever a broken file brings about
        raise ValueError(
            f"Expected {file} to be an image, but it cannot be read ({error}). Make or download it "
            "again, or remove it."
        ) from error
