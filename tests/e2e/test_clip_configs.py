"""The CLIP experiment: its LightningCLI file can be instantiated, its rivals stand in one table."""

import pytest
import yaml
from helpers.clip import TINY
from helpers.configs import CONFIGS, compose_config, render
from helpers.standins import clip_experiment
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from saflex_lightning.recipes.paper import make_paper_tables, paper_cell
from saflex_lightning.recipes.sweep import read_results
from saflex_lightning.train import train

from saflex_lightning.recipes.contrastive import ContrastiveTuner, IWildCamDataModule


@pytest.fixture
def mirror():
    return yaml.safe_load((CONFIGS / "lightning_cli" / "clip_flyp.yaml").read_text())


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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two steps of an experiment and a method on a stand-in of the data."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # undone afterwards, unlike what the run sets
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def run(experiment, method):
        overrides = [f"experiment={experiment}", f"method={method}", *clip_experiment(tmp_path)]
        quiet = ["debug=fast", "trainer.enable_progress_bar=false"]
        return train(compose_config(tmp_path / "run", *overrides, *quiet))

    return run


@pytest.mark.parametrize("experiment", ["clip_flyp", "clip_flyp_ensembled"])
@pytest.mark.parametrize(("method", "steps"), [("zero_shot", 0), ("lp_ft", 2)])
def test_rivals_stand_in_the_same_table(tmp_path, run, experiment, method, steps):
    result = run(experiment, method)
    assert (result["name"], result["steps"]) == (method, steps)
    (table,) = make_paper_tables(read_results(tmp_path))
    (line,) = (line for line in render(table).splitlines() if line[1:].strip().startswith(method))
    suffix = "_ensembled" if "ensembled" in experiment else ""
    for column, metric in (("id", "test_f1"), ("ood", "test_ood_f1")):
        theirs = paper_cell(f"table4/{method}", column + suffix)
        assert f"{theirs.mean:.2f} ± {theirs.spread:.2f}" in line
        assert f"{100 * result[metric]:.2f} (1)" in line
