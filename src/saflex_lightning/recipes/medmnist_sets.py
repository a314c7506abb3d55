"""The 2D MedMNIST sets of the paper: what they hold, and where their files are found."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torchvision.datasets.utils import calculate_md5

__all__ = ["MEDMNIST_SETS", "MedMNISTSet", "download_medmnist", "find_medmnist"]

RECORD = "https://zenodo.org/records/10519652"


class MedMNISTSet(NamedTuple):
    """Facts about one set at 28 pixels.

    Attributes:
        num_classes: Number of classes.
        in_channels: 1 for grey images, 3 for colour.
        rows: Images of the official training, validation and test split.
        md5: Checksum of the official file.
        class_names: Names of the classes, in their order.
    """

    num_classes: int
    in_channels: int
    rows: tuple[int, int, int]
    md5: str
    class_names: tuple[str, ...]


_PATH = (
    *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle"),
    *("normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
)
_DERMA = (
    *("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma"),
    *("benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi"),
    "vascular lesions",
)
_TISSUE = (
    *("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule"),
    *("Glomerular endothelial cells", "Interstitial endothelial cells", "Leukocytes", "Podocytes"),
    *("Proximal Tubule Segments", "Thick Ascending Limb"),
)
_BLOOD = (
    *("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte"),
    *("neutrophil", "platelet"),
)
_OCT = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
_ORGAN = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver"),
    *("lung-left", "lung-right", "pancreas", "spleen"),
)

# Yang et al. 2023, files of version 3; DermaMNIST is CC BY-NC 4.0, the others are CC BY 4.0.
MEDMNIST_SETS: Mapping[str, MedMNISTSet] = MappingProxyType(
    {
        "path": MedMNISTSet(9, 3, (89996, 10004, 7180), "a8b06965200029087d5bd730944a56c1", _PATH),
        "derma": MedMNISTSet(7, 3, (7007, 1003, 2005), "0744692d530f8e62ec473284d019b0c7", _DERMA),
        "tissue": MedMNISTSet(
            8, 1, (165466, 23640, 47280), "ebe78ee8b05294063de985d821c1c34b", _TISSUE
        ),
        "blood": MedMNISTSet(8, 3, (11959, 1712, 3421), "7053d0359d879ad8a5505303e11de1dc", _BLOOD),
        "oct": MedMNISTSet(4, 1, (97477, 10832, 1000), "c68d92d5b585d8d81f7112f81e2d0842", _OCT),
        "organa": MedMNISTSet(
            11, 1, (34561, 6491, 17778), "68e3f8846a6bd62f0c9bf841c0d9eacc", _ORGAN
        ),
        "organc": MedMNISTSet(
            11, 1, (12975, 2392, 8216), "b9ceb9546e10131b32923c5bbeaea2b1", _ORGAN
        ),
        "organs": MedMNISTSet(
            11, 1, (13932, 2452, 8827), "9ab87b696fb54e2a387ebe992d6ed5f1", _ORGAN
        ),
    }
)


def find_medmnist(name: str, root: str, *, check_md5: bool = True) -> Path:
    """Return the official file of a set below a folder.

    Args:
        name: A key of `MEDMNIST_SETS`.
        root: Folder that holds ``<name>mnist.npz``.
        check_md5: Compare the file's checksum with the official one.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If its checksum is another one.
    """
    file = Path(root).expanduser() / f"{name}mnist.npz"
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected the MedMNIST set '{name}' in the folder `root`, but there is no file at "
            f"{file}. Download it from {RECORD}, or set `download` to True."
        )
    if check_md5:
        found = calculate_md5(file)
        if found != MEDMNIST_SETS[name].md5:
            raise ValueError(
                f"Expected {file} to have the md5 {MEDMNIST_SETS[name].md5}, but got {found}. "
                f"Delete it and download it again from {RECORD}, or set `check_md5` to False if "
                "it is a file of your own."
            )
    return file


def download_medmnist(name: str, root: str) -> None:
    """Download the official file of a set with the package ``medmnist``; nothing if it is there.

    Args:
        name: A key of `MEDMNIST_SETS`.
        root: Folder to put it into; made if it is missing.

    Raises:
        ImportError: If the package is not installed.
        RuntimeError: If the download fails.
    """
    folder = Path(root).expanduser()
    if (folder / f"{name}mnist.npz").is_file():
        return
    try:
        medmnist = import_module("medmnist")
    except ImportError as error:
        raise ImportError(
            "Expected the package `medmnist` with `download`=True, but it is not installed. Run "
            f"`pip install 'saflex-lightning[medmnist]'`, or put {name}mnist.npz from {RECORD} "
            f"into {folder}."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    dataset = getattr(medmnist, medmnist.INFO[f"{name}mnist"]["python_class"])
    try:
        dataset(split="train", root=str(folder), download=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"Expected to download {name}mnist.npz into {folder}, but the package `medmnist` "
            f"failed. Look at the network, or put the file there from {RECORD}."
        ) from error
