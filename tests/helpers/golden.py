"""Short runs whose parameters are pinned: a change of numbers must be meant.

In the folder ``tests``, ``python -c "from helpers import golden; golden.write()"`` pins them anew.
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.grouped import Grouped, steering
from helpers.grouped import union_batch as make_union
from helpers.processes import run_in_processes
from helpers.training import NUM_CLASSES, NUM_FEATURES, fit, make_rows, seeded
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from saflex_lightning import SAflexCallback

FILE = Path(__file__).parents[1] / "golden" / "runs.json"
STEPS, PER_EPOCH, ROWS = 20, 6, 16
STOP = 14  # in the middle of the third epoch, between two refreshes
NAME = "stopped"

ENGINES = ("finite_difference", "forward_mode", "head")
CASES = {
    **{
        f"{preset}, {engine}": {"preset": preset, "engine": engine}
        for preset in ("gradient", "paper")
        for engine in ENGINES
    },
    "gradient, head, not normalized": {
        "preset": "gradient",
        "engine": "head",
        "normalize": False,
        "precondition": False,
    },
    "Theorem 1": {"preset": "paper", "label_rule": "argmax", "weight_rule": "sum"},
    "Ren et al.": {
        "preset": "gradient",
        "engine": "finite_difference",
        "label_rule": "keep",
        "weight_rule": "positive",
        "every_n_steps": 3,
    },
    "robust": {},
    "robust, Mixup": {},
    "robust, class weights and smoothing": {},
    "paper, head and evidence": {"preset": "paper", "engine": "head", "row_evidence": True},
}
KINDS = {"Mixup": "soft", "class weights and smoothing": "weighted", "dropout": "dropout"}
CASES |= {name: {"preset": "gradient", "engine": "forward_mode"} for name in KINDS}
KINDS |= {"robust, Mixup": "soft", "robust, class weights and smoothing": "weighted"}
NOT_RESUMED = ("dropout",)  # Lightning saves no random state


class Net(Grouped):
    """Smooth, with batch statistics."""

    def __init__(self, kind="hard"):
        super().__init__(dtype=torch.float64, lr=0.02)
        self.kind = kind
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, 12),
            nn.BatchNorm1d(12),
            nn.Tanh(),
            nn.Dropout(0.1 if kind == "dropout" else 0),
            nn.Linear(12, NUM_CLASSES),
        ).double()

    def training_step(self, batch, batch_idx):
        weighted = self.kind == "weighted"
        weight = torch.linspace(0.5, 2, NUM_CLASSES, dtype=torch.float64) if weighted else None
        target = batch.target
        if self.kind == "soft":
            labels = F.one_hot(target, NUM_CLASSES).double()
            target = 0.7 * labels + 0.3 * labels.roll(1, -1)
        return self.saflex_loss(
            self.saflex_forward(batch.inputs),
            target,
            class_weight=weight,
            label_smoothing=0.1 if weighted else 0.0,
        )


class Batches:
    """The same union batches in every epoch, from any place on; each rank has a slice of each."""

    def __init__(self, rank, world_size):
        self.share = slice(rank, ROWS, world_size)
        self.taken = 0

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        first, self.taken = self.taken, 0
        inputs, target = make_rows(PER_EPOCH * ROWS, dtype=torch.float64)
        for number in range(first, PER_EPOCH):
            rows = torch.arange(number * ROWS, (number + 1) * ROWS)[self.share]
            self.taken = number + 1
            yield make_union(inputs[rows], target[rows], rows)

    def state_dict(self):
        return {"taken": self.taken % PER_EPOCH}

    def load_state_dict(self, state):
        self.taken = state["taken"]


def run(name, *, rank=0, world_size=1, folder=None, steps=STEPS, resume=False):
    """Return the parameters after a run of one case, resumed from the folder or saved to it."""
    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    keepers = [ModelCheckpoint(folder, NAME, every_n_train_steps=STOP)] if folder else []
    module = seeded(partial(Net, KINDS.get(name, "hard")))
    fit(
        module,
        SAflexCallback(steering(torch.float64), **CASES[name]),
        *keepers,
        train=Batches(rank, world_size),
        max_epochs=-1,
        max_steps=steps,
        precision="64-true",
        enable_checkpointing=bool(folder),
        use_distributed_sampler=False,
        ckpt_path=f"{folder}/{NAME}.ckpt" if resume else None,
        **parallel,
    )
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def run_all(rank, world_size):
    """Return the parameters of every case, by its name."""
    return {name: run(name, rank=rank, world_size=world_size) for name in CASES}


def checksums(parameters):
    """Return three numbers that tell parameters apart: projections on fixed directions."""
    flat = torch.cat([value.reshape(-1) for value in parameters.values()])
    place = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    return [float(torch.cos(frequency * place) @ flat) for frequency in (1.0, 2.3, 0.0)]


def write():
    """Pin the numbers of today: every case, on one process and on two."""
    torch.set_num_threads(1)  # as in the tests
    alone = run_all(0, 1)
    together, _ = run_in_processes(run_all, 2, 2)
    pinned = {name: {"1": checksums(alone[name]), "2": checksums(together[name])} for name in CASES}
    FILE.write_text(json.dumps(pinned, indent=1) + "\n")
