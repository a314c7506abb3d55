"""A long run with faults at random steps, each met once; child processes import it by name."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers.training import Classifier, fit, make_loader, make_rows, seeded, state_of
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from saflex_lightning import SAflexCallback
from saflex_lightning.data.resumable import ResumableLoader, ResumableSampler

# No checkpoint falls on the last batch of an epoch: see the expected failure in test_resume.
STEPS, STEPS_PER_EPOCH, CHECKPOINT_EVERY = 2000, 125, 48
FAULTS = ("kill", "kill", "terminate", "kill worker", "raise")
NAME = "latest"


class Planted(Exception):
    pass


class Soaked(Classifier):
    """Some validation batches hold NaN; some steps end the process, in the middle of the solve."""

    def __init__(self, seed, folder):
        super().__init__(plain=True)
        draw = random.Random(seed)
        self.poisoned = set(draw.sample(range(STEPS), 100))
        self.faults = dict(zip(draw.sample(range(100, STEPS), len(FAULTS)), FAULTS, strict=True))
        self.folder = folder

    def saflex_val_batch(self, batch):
        inputs, target = super().saflex_val_batch(batch)
        is_poisoned = self.trainer.global_step in self.poisoned
        return (inputs * float("nan") if is_poisoned else inputs), target

    def saflex_scores(self, *inputs):
        number = self.trainer.global_step
        if self.folder is not None and self.training and number in self.faults:
            met = Path(self.folder, f"met{number}")
            if not met.exists():
                met.touch()
                self.meet(self.faults[number])
        return super().saflex_scores(*inputs)

    def meet(self, fault):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if fault == "kill worker":
            for process in multiprocessing.active_children():
                process.kill()
        if fault == "raise":
            raise Planted


class CountNaN(pl.Callback):
    """Counts the validation batches with NaN that a run without faults meets."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        solution = pl_module.saflex_solution
        self.skipped = getattr(self, "skipped", 0) + int(solution.failed)


def soak(_rank, seed, folder=None):
    """Train 2,000 steps, or what is left of them; return parameters and skipped steps."""
    module = seeded(lambda: Soaked(seed, folder), seed=seed)
    rows = TensorDataset(*make_rows(STEPS_PER_EPOCH * 16))
    sampler = ResumableSampler(rows, num_replicas=1, rank=0, seed=seed)
    workers = {"num_workers": 1} if folder is not None else {}  # the rows do not depend on it
    val = make_loader(40, 8, seed=7, **workers)
    callback = SAflexCallback(val, preset="gradient", gumbel=True, row_evidence=True, seed=seed)
    counter, keepers, checkpoint = CountNaN(), [], None
    if folder is not None:
        keepers = [
            ModelCheckpoint(
                folder, NAME, every_n_train_steps=CHECKPOINT_EVERY, enable_version_counter=False
            )
        ]
        checkpoint = Path(folder, f"{NAME}.ckpt")
    fit(
        module,
        callback,
        counter,
        *keepers,
        train=ResumableLoader(rows, 16, sampler=sampler),
        max_epochs=STEPS // STEPS_PER_EPOCH,
        seed=os.getpid(),  # nothing may depend on the global random state
        ckpt_path=checkpoint if checkpoint is not None and checkpoint.exists() else None,
        enable_checkpointing=folder is not None,
    )
    assert torch.tensor([value.isfinite().all() for value in state_of(module).values()]).all()
    end = state_of(module), callback.state_dict()["skipped_steps"], counter.skipped
    if folder is not None:
        torch.save(end, Path(folder, "end"))
    return end
