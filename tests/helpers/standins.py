"""Small files in the format of data sets that have to be downloaded."""

import numpy as np
from helpers.folders import make_image_folders, make_pool
from PIL import Image

from saflex_lightning.recipes.medmnist_sets import MEDMNIST_SETS


def write_medmnist(folder, name, *, rows=(64, 24, 24), side=28):
    """Write ``<name>mnist.npz`` with random images of that set's channels and classes."""
    facts = MEDMNIST_SETS[name]
    shape = (side, side, 3) if facts.in_channels == 3 else (side, side)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in zip(("train", "val", "test"), rows, strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        labels = np.arange(size, dtype=np.uint8) % facts.num_classes
        arrays[f"{split}_labels"] = labels[:, None]
    file = folder / f"{name}mnist.npz"
    np.savez(file, **arrays)
    return file


def medmnist_experiment(folder):
    """Every official set in one folder, at 28 pixels, for the experiments on medical images."""
    for name in MEDMNIST_SETS:
        write_medmnist(folder, name)
    return [f"data.root={folder}", "data.check_md5=false", "data.batch_size=4"]


def write_iwildcam(folder, *, rows=8, classes=3, side=28):
    """Write ``metadata.csv``, ``categories.csv`` and ``train/`` with random images."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    names = "".join(f"{label},animal {label}\n" for label in range(classes))
    (folder / "categories.csv").write_text("y,name\n" + names)
    lines = ["split,filename,y,location_remapped"]
    for split in ("train", "val", "test", "id_val", "id_test"):
        for row in range(rows):
            name = f"{split}{row}.png"
            pixels = rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name)
            lines.append(f"{split},{name},{row % classes},0")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def clip_experiment(folder):
    """A few camera-trap photos, and a CLIP model with random weights instead of a download."""
    write_iwildcam(folder)
    config = (
        "{embed_dim: 8, vision_cfg: {image_size: 28, layers: 1, width: 16, head_width: 8, "
        "patch_size: 14}, text_cfg: {context_length: 16, vocab_size: 49408, width: 16, heads: 2, "
        "layers: 1}}"
    )
    return [
        f"data.root={folder}",
        "data.image_size=28",
        "data.batch_size=4",
        "data.num_workers=0",
        f"model.encoders.config={config}",
        "trainer.precision=32-true",
    ]


def tabular_experiment(folder):
    """QSAR, which ships with the package: real data, in small batches."""
    return ["data.batch_size=8"]


def blood_experiment(folder):
    """Class folders and a pool, for the experiments on generated images."""
    make_image_folders(folder / "real", splits=("val", "test", "extra"))
    make_pool(folder / "pool")
    files = [f"data.root={folder / 'real'}", f"data.generated={folder / 'pool'}"]
    return [*files, "data.batch_size=4", "data.num_workers=0"]


def imagenet_experiment(folder):
    """The same for a network that starts from ImageNet weights, here from random ones."""
    return [*blood_experiment(folder), "data.image_size=32", "model.network.weights=null"]


# First word of an experiment's name -> function of an empty folder that writes small files in the
# format of its data and returns the overrides that point the experiment at them.
STANDINS = {
    "blood": blood_experiment,
    "clip": clip_experiment,
    "cub": imagenet_experiment,
    "iwildcam": imagenet_experiment,
    "medmnist": medmnist_experiment,
    "tabular": tabular_experiment,
}
