"""Runs that are killed and resumed; child processes import them by name, so they live here."""

import os
import signal

import lightning.pytorch as pl
import torch
from helpers.training import Classifier, fit, make_loader, make_rows, seeded, state_of
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from saflex_lightning import SAflexCallback
from saflex_lightning.data.resumable import ResumableLoader, ResumableSampler

STEPS_PER_EPOCH, EPOCHS = 6, 3
NAME = "latest"


class Batches:
    """A plain iterable of validation batches."""

    def __iter__(self):
        return iter(make_loader(40, 8, seed=7))


def weighted():
    rows = TensorDataset(*make_rows(40, seed=7))
    return DataLoader(rows, 8, sampler=WeightedRandomSampler(torch.arange(1.0, 41.0), 40))


VAL_LOADERS = {
    "plain": lambda: make_loader(40, 8, seed=7),
    "workers": lambda: make_loader(40, 8, seed=7, num_workers=2),
    "weighted": weighted,
    "iterable": Batches,
}


class Mortal(Classifier):
    """A net that sends its own process a signal in the middle of a step.

    The first training pass of a step is the solve's, at moved parameters (of the engine "head"
    it is the training forward).
    """

    def __init__(self, batch=None, sign=signal.SIGKILL):
        super().__init__(plain=True)
        self.last_batch, self.sign = batch, sign

    def saflex_scores(self, *inputs):
        if self.training and self.trainer.fit_loop.total_batch_idx == self.last_batch:
            self.last_batch = None
            os.kill(os.getpid(), self.sign)
        return super().saflex_scores(*inputs)


class StopAfter(pl.Callback):
    """Ends a training that goes on for longer by its own settings."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.steps


def train_loader(rank=0, world_size=1, num_workers=0):
    rows = TensorDataset(*make_rows(STEPS_PER_EPOCH * 16))
    sampler = ResumableSampler(rows, num_replicas=world_size, rank=rank, seed=3)
    return ResumableLoader(rows, 16 // world_size, sampler=sampler, num_workers=num_workers)


def train(
    folder=None,
    *,
    every=4,
    signal_at=None,
    sign=signal.SIGKILL,
    resume=False,
    val="plain",
    rank=0,
    world_size=1,
    num_workers=0,
    accumulate=1,
    stop_after=None,
    **settings,
):
    """Train three epochs of six batches and return the parameters."""
    if sign == signal.SIGINT:
        signal.signal(sign, signal.default_int_handler)  # a background process ignores it
    signal_at = signal_at if rank == world_size - 1 else None
    module = seeded(lambda: Mortal(signal_at, sign), seed=55 if resume else 3)
    keepers = []
    if folder is not None:
        keepers = [
            OnExceptionCheckpoint(folder, NAME)
            if sign in {signal.SIGTERM, signal.SIGINT}
            else ModelCheckpoint(
                folder, NAME, every_n_train_steps=every, enable_version_counter=False
            )
        ]
    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    trainer = fit(
        module,
        SAflexCallback(VAL_LOADERS[val](), **settings),
        *keepers,
        StopAfter(stop_after),
        train=train_loader(rank, world_size, num_workers),
        max_epochs=EPOCHS,
        seed=77 if resume else 1,
        ckpt_path=f"{folder}/{NAME}.ckpt" if resume else None,
        enable_checkpointing=folder is not None,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        **parallel,
    )
    assert trainer.global_step == (
        EPOCHS * STEPS_PER_EPOCH // accumulate if stop_after is None else stop_after
    )
    return state_of(module)


def train_as(rank, world_size, folder, settings):
    return train(folder, rank=rank, world_size=world_size, **settings)
