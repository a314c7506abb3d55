"""Small files in the format of data sets that have to be downloaded."""

import numpy as np

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


# First word of an experiment's name -> function of an empty folder that writes small files in the
# format of its data and returns the overrides that point the experiment at them.
STANDINS = {"medmnist": medmnist_experiment}
