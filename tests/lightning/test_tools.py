"""Callbacks and loggers that people use, beside `SAflexCallback` on edited and unedited modules."""

import csv

import lightning.pytorch as pl
import pytest
import torch
import yaml
from helpers.adopted import Unedited
from helpers.training import (
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_trainer,
    seeded,
    state_of,
)
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner

from saflex_lightning import SAflexCallback

EDITED = pytest.mark.parametrize("make", [Classifier, Unedited])
BEFORE_2_6 = not hasattr(callbacks, "WeightAveraging")
VAL = {"val_dataloaders": make_loader(seed=9)}


class Described(Unedited):
    """Has hyperparameters of its own."""

    def __init__(self, lr=1e-2):
        super().__init__(lr=lr)
        self.save_hyperparameters()


def rows_of(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


# Callbacks


@EDITED
def test_early_stopping_stops_where_nothing_improves(make):
    stop = callbacks.EarlyStopping("val/loss", patience=2)
    module = seeded(lambda: make(lr=0.0, optimizer="sgd", plain=True))
    trainer = fit(module, callback(), stop, max_epochs=20, **VAL)
    assert trainer.current_epoch == stop.stopped_epoch + 1 == 3


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@EDITED
def test_the_best_checkpoint_is_tested_and_the_last_one_resumed(make, tmp_path):
    def train(module, folder, max_epochs, **settings):
        keep = callbacks.ModelCheckpoint(folder, monitor="val/loss", save_last=True)
        run = {"max_epochs": max_epochs, "enable_checkpointing": True, **VAL, **settings}
        return keep, fit(module, callback(), keep, train=make_loader(), **run)

    whole, half, resumed = (seeded(lambda: make(plain=True)) for _ in range(3))
    keep, trainer = train(whole, tmp_path / "whole", 4)
    score = trainer.test(whole, make_loader(seed=9), ckpt_path="best", verbose=False)
    assert score[0]["val/loss"] == pytest.approx(float(keep.best_model_score))
    keep, _ = train(half, tmp_path / "half", 2)
    train(resumed, tmp_path / "half", 4, ckpt_path=keep.last_model_path)
    assert_same_state(state_of(whole), state_of(resumed))


@EDITED
def test_learning_rate_monitor(make, tmp_path):
    class Decaying(make):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    logger = CSVLogger(tmp_path, name="", version="")
    monitor = callbacks.LearningRateMonitor("epoch")
    fit(seeded(Decaying), callback(), monitor, logger=logger, log_every_n_steps=1, max_epochs=3)
    rates = [float(row["lr-SGD"]) for row in rows_of(tmp_path) if row["lr-SGD"]]
    assert rates == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize("bar", [callbacks.RichProgressBar, callbacks.TQDMProgressBar])
@EDITED
def test_progress_bars_show_what_was_learned(make, bar, capfd):
    fit(seeded(make), callback(), bar(), enable_progress_bar=True, **VAL)
    shown = capfd.readouterr()
    assert "saflex/" in shown.out + shown.err


AVERAGES = [
    pytest.param(
        lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
        id="SWA",
    ),
    pytest.param(
        lambda: callbacks.WeightAveraging(),
        id="mean",
        marks=pytest.mark.skipif(BEFORE_2_6, reason="in lightning from 2.6 on"),
    ),
    pytest.param(
        lambda: callbacks.EMAWeightAveraging(decay=0.9),
        id="EMA",
        marks=pytest.mark.skipif(BEFORE_2_6, reason="in lightning from 2.6 on"),
    ),
]


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("make_average", AVERAGES)
def test_averages_of_weights_are_those_of_the_edited_module(make_average):
    states = []
    for make in (Classifier, Unedited):
        module = seeded(make)
        fit(module, callback(), make_average(), max_epochs=4, **VAL)
        states.append(state_of(module))
    assert_same_state(*states)
    alone = seeded(Unedited)
    fit(alone, callback(), max_epochs=4, **VAL)
    assert not alone.net[0].weight.equal(states[0]["net.0.weight"])


def test_learning_rate_finder(tmp_path):
    module = seeded(lambda: Unedited(plain=True))
    trainer = make_trainer(callback(), default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(module, make_loader(), num_training=4, update_attr=False)
    assert len(found.results["lr"]) == 4
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, make_loader())
    assert trainer.callback_metrics["saflex/effective_fraction"] < 1


@EDITED
def test_a_cell_of_a_notebook_that_runs_twice(make):
    """The same module and the same callback in a new Trainer, as when a cell runs again."""
    module, saflex = seeded(make), callback()
    for _ in range(2):
        trainer = fit(module, saflex)
        assert trainer.callback_metrics["saflex/effective_fraction"] < 1
        assert saflex.state_dict()["batches"] == 8


@pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves
def test_finetuning_scheduler(tmp_path):
    scheduler = pytest.importorskip("finetuning_scheduler")

    class Watching(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trained.append(sum(p.requires_grad for p in pl_module.parameters()))
            matched.append(saflex.state_dict()["matching"]["names"])

    trained, matched = [], []
    saflex = SAflexCallback(make_loader(40, 8, seed=7), preset="gradient", engine="forward_mode")
    module = seeded(lambda: Unedited(plain=True))
    schedule = tmp_path / "schedule.yaml"
    phases = {
        0: {"params": ["net.2.weight", "net.2.bias"], "max_transition_epoch": 1},
        1: {"params": ["net.0.weight", "net.0.bias"], "max_transition_epoch": 3},
    }
    schedule.write_text(yaml.safe_dump(phases))
    tuning = scheduler.FinetuningScheduler(ft_schedule=str(schedule), epoch_transitions_only=True)
    fit(
        module,
        tuning,
        scheduler.FTSCheckpoint(monitor="val/loss"),
        saflex,
        Watching(),
        max_epochs=3,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path),
        **VAL,
    )
    assert trained[0] == 2
    assert trained[-1] == 4
    assert [len(names) for names in matched][:: len(matched) - 1] == [2, 4]


# Loggers


def log_a_run(logger, **settings):
    module = seeded(Described)
    saflex = callback(**settings)
    fit(module, saflex, logger=logger, log_every_n_steps=1)
    return saflex


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_csv_has_the_settings_and_what_was_learned(tmp_path, preset):
    log_a_run(CSVLogger(tmp_path, name="", version=""), preset=preset, temperature=0.25)
    found = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert found["lr"] == 1e-2
    assert found["saflex"]["preset"] == preset
    assert found["saflex"]["temperature"] == 0.25
    assert "saflex/effective_fraction" in rows_of(tmp_path)[0]


def test_tensorboard_has_the_settings_and_what_was_learned(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    log_a_run(TensorBoardLogger(tmp_path, name="", version=""), preset="paper")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "saflex/effective_fraction" in events.Tags()["scalars"]
    start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    board = HParamsPluginData.FromString(start).session_start_info.hparams
    assert board["saflex/preset"].string_value == "paper"
    assert board["lr"].number_value == 1e-2


@pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves
def test_mlflow_has_the_settings_and_what_was_learned(tmp_path):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("adoption", tracking_uri=f"sqlite:///{tmp_path}/runs.db")
    log_a_run(logger, preset="paper")
    run = logger.experiment.get_run(logger.run_id).data
    assert run.params["saflex/preset"] == "paper"
    assert run.params["lr"] == "0.01"
    assert "saflex/effective_fraction" in run.metrics


@pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves
def test_offline_weights_and_biases_has_the_settings(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    try:
        log_a_run(logger, preset="paper")
        config = dict(logger.experiment.config)
        assert config["saflex"]["preset"] == "paper"
        assert config["lr"] == 1e-2
        assert "saflex/effective_fraction" in dict(logger.experiment.summary)
    finally:
        wandb.finish()
