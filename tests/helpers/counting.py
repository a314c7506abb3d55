"""Count what a training step asks of a device: kernels, and looks at values, which wait for it."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.benchmarks import load_benchmark
from helpers.training import Classifier, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import saflex_lightning
from saflex_lightning import AugmentedBatch, SAflexCallback

PACKAGE = str(Path(saflex_lightning.__file__).parent)
ROWS, FEATURES, CLASSES = 128, 64, 8
FIRST, LAST = 20, 60  # steps that are counted: four, five and ten divide their number
NO_LAUNCH = load_benchmark("step_time").NO_LAUNCH
LOOKS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero", "unique")


class Kernels(TorchDispatchMode):
    """Counts the calls that launch something, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in NO_LAUNCH:
            self.counts[name] += 1
        by_mask = name == "index" and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if by_mask or name in {"_local_scalar_dense", "equal", "masked_select"}:
            note_look(name)
        return func(*args, **(kwargs or {}))


class Perceptron(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 256),
            torch.nn.ReLU(),
            torch.nn.Linear(256, 256),
            torch.nn.ReLU(),
            torch.nn.Linear(256, CLASSES),
        )

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)


class Count(pl.Callback):
    """Counts each step from its batch's first hook to its last; the first and the last callback."""

    def __init__(self):
        self.kernels, self.looks = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if FIRST <= batch_idx < LAST and batch_idx not in self.kernels:
            self.looks[batch_idx] = LOOKED[:] = []
            self.kernels[batch_idx] = Kernels()
            self.kernels[batch_idx].__enter__()

    def mean(self):
        return sum(sum(one.counts.values()) for one in self.kernels.values()) / (LAST - FIRST)


class Stop(pl.Callback):
    def __init__(self, count):
        self.count = count

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in self.count.kernels:
            self.count.kernels[batch_idx].__exit__(None, None, None)
            self.count.looks[batch_idx] = list(LOOKED)


LOOKED: list[str] = []


def note_look(name):
    """Note who in the package looks at values, where it is the package."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        inside = any(part in frame.f_code.co_filename for part in ("/torch/", "/helpers/"))
        if not inside:
            return
        frame = frame.f_back
    if frame:
        LOOKED.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")


@contextmanager
def as_on_an_accelerator():
    """Let the package believe that looking at values waits for a device, and note where it does."""

    def noting(name, method):
        def look(*args, **kwargs):
            note_look(name)
            return method(*args, **kwargs)

        return look

    with pytest.MonkeyPatch.context() as patch:
        for name in LOOKS:
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        for name, module in list(sys.modules.items()):
            if name.startswith("saflex_lightning.") and hasattr(module, "looking_is_free"):
                patch.setattr(module, "looking_is_free", lambda _tensor: False)
        yield


def union_batches(number=LAST + 4):
    """Half of the rows are augmented, by three operations, and come again after some steps."""
    generator = torch.Generator().manual_seed(0)
    half = ROWS // 2
    is_augmented = torch.arange(ROWS) >= half
    for step in range(number):
        inputs = torch.randn(ROWS, FEATURES, generator=generator)
        target = torch.randint(CLASSES, (ROWS,), generator=generator)
        yield AugmentedBatch(
            inputs,
            target,
            is_augmented,
            is_augmented * (1 + torch.arange(ROWS) % 3),
            torch.arange(ROWS) + ROWS * (step % 8),
        )


def count(*callbacks):
    """Train for some steps and return what was counted."""
    counted = Count()
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(
        counted,
        *callbacks,
        Stop(counted),
        max_epochs=1,
        log_every_n_steps=1000,  # what a logger reads is computed for it
    )
    trainer.fit(Perceptron(), DataLoader(list(union_batches()), batch_size=None))
    return counted


def saflex(**settings):
    generator = torch.Generator().manual_seed(7)
    rows = TensorDataset(
        torch.randn(320, FEATURES, generator=generator), torch.arange(320) % CLASSES
    )
    return SAflexCallback(DataLoader(rows, ROWS // 4), seed=0, **settings)
