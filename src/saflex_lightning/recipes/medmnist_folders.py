"""A MedMNIST file written as class folders of PNG images."""

from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.medmnist import read_medmnist

__all__ = ["write_medmnist_folders"]


def write_medmnist_folders(output: str, *, path: str | None = None) -> None:
    """Write a MedMNIST file as ``{output}/{train,val,test}/{label}/{row}.png``.

    Args:
        output: Folder to write to.
        path: A MedMNIST ``.npz``; by default the BloodMNIST subset that ships with the package.

    Raises:
        TypeError: If a path is none.
    """
    check("a path", output=output)
    check("a path", optional=True, path=path)
    for name, split in read_medmnist(path).items():
        for row, (image, label) in enumerate(zip(split.images, split.target, strict=True)):
            # Two digits, so that the sorted names of the folders are in the order of the labels.
            file = Path(output, name, f"{label:02d}", f"{row:05d}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(file)
    print(f"images written to {output}")
