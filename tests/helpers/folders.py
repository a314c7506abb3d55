"""Small image folders and pools of generated images, in the layouts that users have."""

import csv

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")


def write_image(path, *, seed=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_image_folders(root, *, train=(6, 4, 2), other=2, size=8, splits=("val", "test")):
    """``{root}/{split}/{class}/00.png``: so many training images of each class."""
    seed = 0
    for split in ("train", *splits):
        for name, number in zip(CLASSES, train, strict=True):
            for k in range(number if split == "train" else other):
                seed += 1
                write_image(root / split / name / f"{k:02d}.png", seed=seed, size=size)
    return root


def make_pool(root, *, train=(6, 4, 2), edits=2, size=8, prompts=("in_the_rain", "at_night")):
    """``{root}/{prompt}/strength-0.6_guidance-7.5/{class}/{source}-{k}.png``, all sources."""
    seed = 1000
    for prompt in prompts:
        source = 0
        for name, number in zip(CLASSES, train, strict=True):
            for _ in range(number):
                for k in range(edits):
                    seed += 1
                    folder = root / prompt / "strength-0.6_guidance-7.5" / name
                    write_image(folder / f"{source}-{k}.png", seed=seed, size=size)
                source += 1
    return root


def write_manifest(root, rows, *, columns=("file", "class", "source", "generator", "prompt")):
    with (root / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
