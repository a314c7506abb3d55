"""SimCLR on the shipped BloodMNIST images, with and without SAFLEX, by a linear probe.

    python benchmarks/simclr.py --seeds 1 2

Features are learned without labels; then a linear classifier is fitted to those of the 1,200
training images and tested on 1,000 others.
"""

import argparse

import lightning as L
import torch

from saflex_lightning import SAflexCallback
from saflex_lightning.recipes.batches import normalize
from saflex_lightning.recipes.contrastive import fit_linear_probe
from saflex_lightning.recipes.contrastive.simclr import (
    SimCLR,
    TwoViewsDataModule,
)
from saflex_lightning.recipes.medmnist import read_medmnist
from saflex_lightning.recipes.quiet import silence_hints
from saflex_lightning.recipes.small_cnn import make_small_encoder

ROWS = {
    "random features": None,
    "SimCLR": [],
    "SAFLEX paper": ["paper"],
    "SAFLEX robust": ["robust"],
}


def probe_accuracy(model):
    """Return the test accuracy of a linear probe on the model's features."""
    splits = read_medmnist()
    with torch.no_grad():
        features = {
            name: model.eval()(normalize(splits[name].images)) for name in ("train", "test")
        }
    probe = fit_linear_probe(features["train"], splits["train"].target, 8, penalty=1e-4)
    predicted = probe(features["test"]).argmax(-1)
    return (predicted == splits["test"].target).float().mean().item()


def run(presets, seed, epochs):
    """Train one row and return its accuracy; None does not train."""
    L.seed_everything(seed, verbose=False)
    model = SimCLR(make_small_encoder(), 128)
    if presets is not None:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SAflexCallback(preset=preset) for preset in presets],
        )
        trainer.fit(model, datamodule=TwoViewsDataModule(seed=seed))
    return probe_accuracy(model)


def main():
    """Run the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    settings = parser.parse_args()
    silence_hints()
    seeds = ", ".join(f"seed {seed}" for seed in settings.seeds)
    print(f"| row | test accuracy of the probe, {seeds} |\n|---|---|")
    for row, presets in ROWS.items():
        found = [run(presets, seed, settings.epochs) for seed in settings.seeds]
        print(f"| {row} | " + ", ".join(f"{100 * value:.1f}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    main()
