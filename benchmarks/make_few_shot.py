"""Draw few images per class into a file in the layout of MedMNIST, one file per seed.

    python benchmarks/make_few_shot.py bloodmnist.npz few_shot/blood --seeds 1 2 3
    python benchmarks/make_few_shot.py FOLDER few_shot/fashion --seeds 1 2 3

The source is an official MedMNIST file, or the folder of Fashion-MNIST as the Debian package
dataset-fashion-mnist installs it; its training images also give the validation rows. Files of two
seeds share rows by chance only; the test rows are the same in all of them.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]  # images, labels


def read_idx(file: Path, header: int) -> np.ndarray:
    """Return the bytes of a gzipped IDX file behind its header.

    Args:
        file: The file.
        header: Bytes to leave out.
    """
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def read_source(source: Path) -> tuple[Rows, Rows, Rows]:
    """Return the rows that training, validation and test images are drawn from.

    Args:
        source: A MedMNIST file or the folder of Fashion-MNIST.
    """
    if source.is_dir():
        train, test = (
            (
                read_idx(source / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
                read_idx(source / f"{part}-labels-idx1-ubyte.gz", 8),
            )
            for part in ("train", "t10k")
        )
        half = len(train[1]) // 2
        return (train[0][:half], train[1][:half]), (train[0][half:], train[1][half:]), test
    with np.load(source) as file:
        train, val, test = (
            (file[f"{split}_images"], file[f"{split}_labels"].ravel())
            for split in ("train", "val", "test")
        )
    return train, val, test


def draw(rows: Rows, per_class: int, rng: np.random.Generator) -> Rows:
    """Return some rows of each class, in mixed order.

    Args:
        rows: Images and labels.
        per_class: Rows of each class.
        rng: Source of randomness.
    """
    images, labels = rows
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), per_class, replace=False)
            for label in np.unique(labels)
        ]
    )
    chosen = rng.permutation(chosen)
    return images[chosen], labels[chosen, None]


def main() -> None:
    """Write one file per seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("prefix", type=Path, help="files are called PREFIX_SEED.npz")
    parser.add_argument("--train", type=int, default=50, help="images per class")
    parser.add_argument("--val", type=int, default=25, help="images per class")
    parser.add_argument("--test", type=int, default=200, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    args = parser.parse_args()
    train, val, test = read_source(args.source)
    args.prefix.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        splits = {
            "train": draw(train, args.train, rng),
            "val": draw(val, args.val, rng),
            "test": draw(test, args.test, np.random.default_rng(0)),
        }
        file = args.prefix.with_name(f"{args.prefix.name}_{seed}.npz")
        arrays = {f"{name}_images": images for name, (images, _) in splits.items()}
        arrays |= {f"{name}_labels": labels for name, (_, labels) in splits.items()}
        np.savez_compressed(file, **arrays)
        print(file, {name: len(images) for name, (images, _) in splits.items()})


if __name__ == "__main__":
    main()
