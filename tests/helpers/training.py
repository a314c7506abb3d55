"""Small modules, data and Trainers for tests of the Lightning glue."""

from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from saflex_lightning import SAflexCallback, SAflexMixin
from saflex_lightning.evidence import evidence

NUM_CLASSES, NUM_FEATURES = 4, 8
GRADIENT = {"preset": "gradient"}
ENGINES = [
    {**GRADIENT, "engine": engine} for engine in ("finite_difference", "forward_mode", "head")
]
EVERY_WAY = [{}, *ENGINES]  # of a step: from evidence, or from gradients by each engine


@contextmanager
def short_warm_up(*, groups=evidence._WARM_UP):
    """Weigh rows that stand alone from the third step on, where no fixture reaches.

    Args:
        groups: Training batches during which nothing is learned of groups.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_WARM_UP_ALONE", 2)
        patch.setattr(evidence, "_WARM_UP", groups)
        yield


def make_rows(num_rows, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_rows, NUM_FEATURES, generator=generator, dtype=dtype)
    teacher = torch.randn(
        NUM_FEATURES, NUM_CLASSES, generator=torch.Generator().manual_seed(99), dtype=dtype
    )
    return inputs, (inputs @ teacher).argmax(-1)


def make_loader(
    num_rows=64, batch_size=16, *, seed=0, shuffle=False, dtype=torch.float32, **kwargs
):
    rows = TensorDataset(*make_rows(num_rows, seed=seed, dtype=dtype))
    return DataLoader(rows, batch_size, shuffle=shuffle, **kwargs)


def make_net(*, plain=False, dtype=torch.float32):
    """A net with BatchNorm and dropout, or without either."""
    middle = [nn.Tanh()] if plain else [nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
    net = nn.Sequential(nn.Linear(NUM_FEATURES, 16), *middle, nn.Linear(16, NUM_CLASSES))
    return net.to(dtype)


class Classifier(SAflexMixin, pl.LightningModule):
    def __init__(self, *, plain=False, dtype=torch.float32, optimizer="adam", lr=1e-2):
        super().__init__()
        self.net = make_net(plain=plain, dtype=dtype)
        self.optimizer_name, self.lr = optimizer, lr
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, target = batch[:2]
        logits = self.saflex_forward(inputs)
        loss = self.saflex_loss(logits, target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, target = batch[:2]
        logits = self(inputs)
        self.accuracy(logits, target)
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", self.saflex_loss(logits, target))

    test_step = validation_step

    def configure_optimizers(self):
        make = torch.optim.Adam if self.optimizer_name == "adam" else torch.optim.SGD
        return make(self.parameters(), self.lr)


def callback(**settings):
    """One that is steered by forty rows, in batches of eight."""
    return SAflexCallback(make_loader(40, 8, seed=7), **settings)


def make_trainer(*callbacks, **kwargs):
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(module, *callbacks, train=None, seed=1, val_dataloaders=None, ckpt_path=None, **kwargs):
    """Seed everything, fit, and return the Trainer."""
    pl.seed_everything(seed, verbose=False)
    trainer = make_trainer(*callbacks, **kwargs)
    train = make_loader(shuffle=True) if train is None else train
    trainer.fit(module, train, val_dataloaders, ckpt_path=ckpt_path)
    return trainer


def seeded(make, seed=3):
    torch.manual_seed(seed)
    return make()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
