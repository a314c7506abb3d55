"""A tiny `open_clip` model and batches for it; nothing is downloaded."""

import os

import torch
from torch.utils.data import DataLoader

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.contrastive import ContrastiveTuner, OpenClipEncoders

os.environ["HF_HUB_OFFLINE"] = "1"  # before `open_clip` is imported, which happens where it is used

NAMES = ["basophil", "eosinophil", "platelet"]
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_tuner(**settings):
    torch.manual_seed(5)
    settings = {"lr": 1e-3, "warmup_steps": 1, **settings}
    return ContrastiveTuner(OpenClipEncoders(config=TINY), NAMES, **settings)


def make_images(rows, seed=0, size=28):
    """Images whose brightness in one third of the picture tells the class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % len(NAMES)
    images = 0.3 * torch.randn(rows, 3, size, size, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, :, label * size // 3 : (label + 1) * size // 3] += 0.6
    return images.clamp(-1, 1), labels


def union_batches(rows=6, batches=2):
    made = []
    for number in range(batches):
        images, labels = make_images(rows, seed=number)
        index = torch.arange(rows) + number * rows
        made.append(
            AugmentedBatch(
                inputs=torch.cat([images, images.flip(-1)]),
                target=labels.repeat(2),
                augmented=torch.arange(2 * rows) >= rows,
                group=(torch.arange(2 * rows) >= rows).long(),
                index=torch.cat([index, index + rows * batches]),
            )
        )
    return DataLoader(made, batch_size=None)
