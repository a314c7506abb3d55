"""A user's training script, for every way to launch it: ``script.py STRATEGY PROCESSES FILE``."""

import sys

import torch
import torch.distributed as dist
from helpers.training import Classifier, fit, make_loader, seeded, state_of
from torch.utils.data import Sampler

from saflex_lightning import SAflexCallback


class Share(Sampler):
    """This process's rows of one batch of 32 after another."""

    def __init__(self, processes):
        self.processes = processes

    def __iter__(self):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return (row for row in range(160) if row % 32 * self.processes // 32 == rank)

    def __len__(self):
        return 160 // self.processes


def train(strategy, processes):
    """Train on batches of 32 rows, and 16 to steer, of which every process has its share."""
    module = seeded(lambda: Classifier(plain=True, dtype=torch.float64, optimizer="sgd", lr=0.1))
    val = make_loader(96, 16 // processes, seed=7, dtype=torch.float64)
    trainer = fit(
        module,
        SAflexCallback(val),
        train=make_loader(160, 32 // processes, dtype=torch.float64, sampler=Share(processes)),
        use_distributed_sampler=False,
        precision="64-true",
        strategy=strategy,
        devices=processes,
    )
    return trainer, state_of(module)


if __name__ == "__main__":
    trainer, parameters = train(sys.argv[1], int(sys.argv[2]))
    if trainer.is_global_zero:
        torch.save(parameters, sys.argv[3])
