"""Modules and Trainers of the twin package train as those of `lightning`."""

import lightning.pytorch as pl
import pytest
import pytorch_lightning as twin
import torch
from helpers.adopted import Unedited
from helpers.grouped import NAMES, grouped_loader, steering
from helpers.training import (
    NUM_CLASSES,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_net,
    seeded,
    state_of,
)
from torchmetrics.classification import MulticlassAccuracy

from saflex_lightning import SAflexCallback, SAflexMixin
from saflex_lightning.validation.stream import overrides

METHODS = ("forward", "training_step", "validation_step", "configure_optimizers")


def twin_of(cls, *bases):
    """Return a class of the twin package with the steps of a class."""

    def __init__(self):
        super(made, self).__init__()
        self.net = make_net()
        self.optimizer_name, self.lr = "adam", 1e-2
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    methods = {name: getattr(cls, name) for name in METHODS}
    made = type(cls.__name__, (*bases, twin.LightningModule), {"__init__": __init__, **methods})
    made.saflex_group_names = lambda self: NAMES
    return made


def fit_twin(module, *callbacks, train=None, **kwargs):
    """Do what `fit` does, by the twin's Trainer."""
    twin.seed_everything(1, verbose=False)
    trainer = twin.Trainer(
        callbacks=list(callbacks),
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, train or make_loader(shuffle=True), make_loader(seed=9))
    return trainer


class Named(Unedited):
    def saflex_group_names(self):
        return NAMES


@pytest.mark.parametrize("is_union", [False, True])
@pytest.mark.parametrize("steers", ["a loader", "the Trainer's own rows"])
def test_an_unedited_module_of_the_twin_package(steers, is_union):
    rows = steering() if steers == "a loader" else None
    runs = []
    for run, make in ((fit, Named), (fit_twin, twin_of(Unedited))):
        module, train = seeded(make), grouped_loader() if is_union else None
        settings = {"val_dataloaders": make_loader(seed=9)} if run is fit else {}
        trainer = run(module, SAflexCallback(rows), train=train, **settings)
        assert "saflex/effective_fraction" in trainer.callback_metrics
        runs.append(state_of(module))
    assert_same_state(*runs)


def test_an_edited_module_of_the_twin_package():
    ours, twins = seeded(Classifier), seeded(twin_of(Classifier, SAflexMixin))
    fit(ours, callback(), val_dataloaders=make_loader(seed=9))
    fit_twin(twins, callback())
    assert_same_state(state_of(ours), state_of(twins))


def test_a_checkpoint_of_the_twin_package_holds_the_state(tmp_path):
    file = tmp_path / "half.ckpt"
    saflex = callback()
    fit_twin(seeded(twin_of(Unedited)), saflex).save_checkpoint(file)
    state = torch.load(file, weights_only=False)["callbacks"]["SAflexCallback"]
    assert state["batches"] == saflex.state_dict()["batches"] == 8


@pytest.mark.parametrize("package", [pl, twin])
def test_methods_of_lightning_are_told_from_those_of_a_module(package):
    class Own(package.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    class Data(package.LightningDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch

    module = Own()
    assert overrides(module, "training_step")
    assert not overrides(module, "validation_step")
    assert not overrides(module, "on_before_batch_transfer")
    assert overrides(Data(), "on_before_batch_transfer")
    assert not overrides(module, "no_such_method")
    module.validation_step = print
    assert overrides(module, "validation_step")
