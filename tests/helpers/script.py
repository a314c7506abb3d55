"""A user's training script, for every way to launch it: ``script.py STRATEGY PROCESSES FILE``."""

import sys

import torch
from helpers.training import Classifier, fit, make_loader, seeded, state_of

from saflex_lightning import SAflexCallback


def train(strategy, processes):
    """Train on batches of 32 rows, and 16 to steer, shared out by Lightning's own sampler."""
    module = seeded(lambda: Classifier(plain=True, dtype=torch.float64, optimizer="sgd", lr=0.1))
    val = make_loader(96, 16 // processes, seed=7, dtype=torch.float64)
    trainer = fit(
        module,
        SAflexCallback(val),
        train=make_loader(160, 32 // processes, dtype=torch.float64),
        precision="64-true",
        strategy=strategy,
        devices=processes,
    )
    return trainer, state_of(module)


if __name__ == "__main__":
    trainer, parameters = train(sys.argv[1], int(sys.argv[2]))
    if trainer.is_global_zero:
        torch.save(parameters, sys.argv[3])
