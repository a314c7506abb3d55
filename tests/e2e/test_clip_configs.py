"""The LightningCLI file of the CLIP experiment is the Hydra experiment, and can be instantiated."""

import pytest
import yaml
from helpers.clip import TINY
from helpers.configs import CONFIGS, compose_config
from helpers.standins import clip_experiment
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from omegaconf import OmegaConf

from saflex_lightning.recipes.contrastive import ContrastiveTuner, IWildCamDataModule
from saflex_lightning.train import train


def as_class_path(config):
    """Write ``_target_`` as LightningCLI does."""
    if isinstance(config, dict) and "_target_" in config:
        args = {name: as_class_path(value) for name, value in config.items() if name != "_target_"}
        return {"class_path": config["_target_"], "init_args": args}
    return config


@pytest.fixture
def mirror():
    return yaml.safe_load((CONFIGS / "lightning_cli" / "clip_flyp.yaml").read_text())


def test_model_and_data_are_those_of_the_experiment(tmp_path, mirror):
    cfg = compose_config(tmp_path, "experiment=clip_flyp", "method=saflex_robust")
    experiment = OmegaConf.to_container(cfg, resolve=True)
    assert mirror["model"] == as_class_path(experiment["model"])
    assert mirror["data"] == as_class_path(experiment["data"])
    for name in ("max_epochs", "precision"):
        assert mirror["trainer"][name] == experiment["trainer"][name]
    assert mirror["seed_everything"] == experiment["seed"]


# The parser's method has a newer name, which LightningCLI does not call yet.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_file_can_be_instantiated(mirror):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    mirror["model"]["init_args"]["encoders"]["init_args"]["config"] = TINY
    made = parser.instantiate_classes(
        parser.parse_object({"model": mirror["model"], "data": mirror["data"]})
    )
    assert isinstance(made.model, ContrastiveTuner)
    assert made.model.lr == 1e-5
    assert isinstance(made.data, IWildCamDataModule)
    assert made.data.augmentation_settings == {"num_ops": 2, "magnitude": 9}


def test_zero_shot_row_is_a_run_without_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # undone afterwards, unlike what the run sets
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    overrides = ["experiment=clip_flyp", "method=no_aug", "name=zero_shot", "debug=fast"]
    quiet = ["trainer.max_epochs=0", "trainer.enable_progress_bar=false"]
    cfg = compose_config(tmp_path, *overrides, *clip_experiment(tmp_path), *quiet)
    result = train(cfg)
    assert (result["name"], result["steps"]) == ("zero_shot", 0)
    assert 0.0 <= result["test_ood_f1"] <= 1.0
