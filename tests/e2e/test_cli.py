"""``saflex``: driven with arguments in a clean directory."""

import sys
from pathlib import Path

import pytest
import yaml
from helpers.configs import CONFIGS, compose_config
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

import saflex_lightning
from saflex_lightning.cli.report_page import make_page
from saflex_lightning.cli.saflex import compose_experiment, find_config, main

EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
SHIPPED = "main"
RUN = Path("outputs/main")
SHORT = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--data.batch_size=4",
    "--data.eval_batch_size=128",
)


@pytest.fixture(autouse=True)
def _clean_directory(tmp_path, monkeypatch):
    """Run in an empty directory; undo what ``seed_everything`` writes into the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.fixture
def saflex(monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["saflex", *args])
        assert main() is None  # the console script passes what it returns to sys.exit

    return run


# Testing a checkpoint of another run: Lightning says that it forgets which of its files was best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_shipped_config_fits_tests_and_fits_again(saflex):
    saflex("fit", "--config", SHIPPED, *SHORT, "--trainer.max_epochs=1")
    saved = RUN / "version_0" / "config.yaml"
    written = yaml.safe_load(saved.read_text())
    assert written["trainer"]["max_epochs"] == 1
    assert written["data"]["init_args"]["batch_size"] == 4
    (callback,) = written["trainer"]["callbacks"]
    assert callback["class_path"] == "saflex_lightning.SAflexCallback"
    assert "saflex/solve_seconds" in (RUN / "version_0" / "metrics.csv").read_text()
    assert "not judged" in make_page(RUN / "version_0")  # of the tables of SAflexInsight

    (checkpoint,) = (RUN / "version_0" / "checkpoints").glob("*.ckpt")
    saflex("test", f"--config={SHIPPED}", *SHORT, "--ckpt_path", str(checkpoint))
    saflex("fit", "--config", str(saved))
    assert (RUN / "version_2" / "config.yaml").is_file()


def test_saved_config_may_be_written_twice_into_one_directory(saflex):
    args = ("fit", "-c", SHIPPED, *SHORT, "--trainer.max_epochs=1", "--trainer.logger=false")
    saflex(*args, "--trainer.enable_checkpointing=false")
    saflex(*args, "--trainer.enable_checkpointing=false")
    assert (RUN / "config.yaml").is_file()


def test_a_dry_run_leaves_no_tables(saflex):
    saflex("fit", "-c", SHIPPED, *SHORT, "--trainer.fast_dev_run=true")
    assert not list(Path().rglob("saflex_*"))


def test_callback_is_added_by_class_path(saflex):
    saflex(
        "fit",
        *("--model=saflex_lightning.recipes.Classifier", "--model.lr=0.01"),
        "--model.network=saflex_lightning.recipes.ResNet18",
        *("--data=saflex_lightning.recipes.MedMNISTDataModule", *SHORT),
        *("--trainer.max_epochs=1", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"),
        "--trainer.logger.save_dir=logs",
        "--trainer.enable_checkpointing=false",
        "--trainer.callbacks+=saflex_lightning.SAflexCallback",
        *("--trainer.callbacks.preset=paper", "--trainer.callbacks.engine=head"),
    )
    saved = yaml.safe_load(Path("logs/lightning_logs/version_0/config.yaml").read_text())
    (callback,) = saved["trainer"]["callbacks"]
    assert callback["class_path"] == "saflex_lightning.SAflexCallback"
    assert callback["init_args"]["preset"] == "paper"
    assert callback["init_args"]["engine"] == "head"
    assert "saflex/kept_fraction" in Path("logs/lightning_logs/version_0/metrics.csv").read_text()


def plain(value):
    """The settings that an object holds: builtins only, one level of objects deep."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return {
        name: setting
        for name, setting in vars(value).items()
        if not name.startswith("_") and isinstance(setting, (bool, int, float, str, type(None)))
    }


def parse(monkeypatch, config, *args):
    """What ``saflex`` instantiates before it fits."""
    monkeypatch.setattr(sys, "argv", ["saflex"])  # LightningCLI warns about arguments given twice
    return LightningCLI(
        args=["--config", find_config(config), "--trainer.accelerator=cpu", *args],
        run=False,
        auto_configure_optimizers=False,
    )


# What is given to ``saflex`` -> what is given to ``saflex-train``.
JOBS = {
    ("main",): ["experiment=weak_labels"],
    ("tabular_mlp method=saflex_gradient model.network.width=16",): [
        *("experiment=tabular_mlp", "method=saflex_gradient", "model.network.width=16")
    ],
    ("medmnist_4gpu_fp16", "--trainer.precision=32"): [
        *("experiment=medmnist_randaugment", "trainer=ddp_4gpu", "data.batch_size=32"),
        *("data.steering=split", "data.num_workers=4", "trainer.precision=32"),
    ],
    # CLIP's weights are a download.
    **{(name,): [f"experiment={name}"] for name in EXPERIMENTS if not name.startswith("clip")},
}


@pytest.mark.parametrize(("given", "overrides"), JOBS.items(), ids=[key[0] for key in JOBS])
def test_same_objects_as_a_job_of_hydra(tmp_path, monkeypatch, given, overrides):
    cli = parse(monkeypatch, *given)
    cfg = compose_config(tmp_path, *overrides, "trainer.accelerator=cpu")
    data, model = instantiate(cfg.data), instantiate(cfg.model)
    saflex, trainer = instantiate(cfg.callbacks.saflex), instantiate(cfg.trainer)

    assert cli.config.seed_everything == cfg.seed
    assert type(cli.datamodule) is type(data)
    assert plain(cli.datamodule) == plain(data)
    assert cli.datamodule.augmentation_settings == data.augmentation_settings
    assert type(cli.model) is type(model)
    settings = {key: value for key, value in cli.model.hparams.items() if key[0] != "_"}
    assert settings == dict(model.hparams)
    assert cli.model._maker == model._maker

    theirs = [c for c in cli.trainer.callbacks if isinstance(c, saflex_lightning.SAflexCallback)]
    assert [plain(callback) for callback in theirs] == [plain(saflex)]
    assert theirs[0].preset == saflex.preset
    assert type(cli.trainer.logger) is type(trainer.logger)
    for name in (
        "max_epochs",
        "check_val_every_n_epoch",
        "num_devices",
        "log_every_n_steps",
        "num_sanity_val_steps",
        "precision",
    ):
        assert getattr(cli.trainer, name) == getattr(trainer, name), name


def with_targets(value):
    """Write class paths as Hydra does."""
    if isinstance(value, list):
        return [with_targets(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"class_path", "init_args"}:
        return {"_target_": value["class_path"], **with_targets(value["init_args"])}
    return {key: with_targets(entry) for key, entry in value.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_leaf_of_an_experiment_is_that_of_hydra(name):
    """Nothing is added and nothing is lost, but what two commands need between them."""
    job = with_targets(compose_experiment(name))
    cfg = compose_config(f"outputs/{name}", f"experiment={name}", "trainer.enable_checkpointing=1")
    expected = OmegaConf.to_container(cfg, resolve=True)
    expected["trainer"]["logger"] |= {"name": "", "version": None}
    trainer = {"_target_": "lightning.Trainer", **job["trainer"]}
    if expected["trainer"].get("check_val_every_n_epoch", 1) == 1:
        del expected["callbacks"]["last"]  # Lightning keeps the last weights itself
    for callback in expected["callbacks"].values():
        callback.pop("dirpath", None)  # the run's own folder
    assert trainer.pop("callbacks") == list(expected["callbacks"].values())
    assert (trainer, job["model"], job["data"]) == tuple(
        expected[part] for part in ("trainer", "model", "data")
    )


class TestFindConfig:
    packaged = str(CONFIGS / "lightning_cli" / "medmnist_4gpu_fp16.yaml")

    @pytest.mark.parametrize(
        "name", ["medmnist_4gpu_fp16", "configs/lightning_cli/medmnist_4gpu_fp16.yaml"]
    )
    def test_shipped_file_is_found_from_anywhere(self, name):
        assert find_config(name) == self.packaged

    def test_an_experiment_is_composed_with_overrides(self):
        found = yaml.safe_load(find_config("tabular_mlp method=uniform data=arrhythmia seed=7"))
        assert found["seed_everything"] == 7
        assert found["data"]["init_args"]["dataset"] == "arrhythmia"
        (last,) = found["trainer"]["callbacks"]
        assert last["class_path"].endswith(".ModelCheckpoint")
        assert "dirpath" not in last["init_args"]  # that of the logger

    def test_weights_go_where_the_user_says(self):
        mine = "+callbacks.mine={_target_: lightning.pytorch.callbacks.ModelCheckpoint}"
        given = f"main callbacks=best callbacks.best.dirpath=here '{mine}'"
        callbacks = yaml.safe_load(find_config(given))["trainer"]["callbacks"]
        keepers = [c for c in callbacks if c["class_path"].endswith(".ModelCheckpoint")]
        assert [c["init_args"].get("dirpath") for c in keepers] == ["here", None]

    def test_a_long_list_of_overrides_is_no_name_of_a_file(self):
        columns = ",".join(map(str, range(1000, 1060)))
        found = yaml.safe_load(find_config(f"tabular_mlp 'data.categorical=[{columns}]'"))
        assert len(found["data"]["init_args"]["categorical"]) == 60

    def test_a_command_that_a_launcher_repeats_is_composed_already(self):
        text = find_config("main")
        assert find_config(text) == text

    @pytest.mark.parametrize("name", ["main", "tabular_mlp"])
    def test_a_file_that_exists_wins(self, tmp_path, name):
        (tmp_path / name).write_text("")
        assert find_config(name) == name

    @pytest.mark.parametrize("name", ["mine.yaml", "", "it's mine.yaml"])
    def test_other_names_are_left_to_the_parser(self, name):
        assert find_config(name) == name


def test_missing_config_is_reported(saflex, capsys):
    with pytest.raises(SystemExit):
        saflex("fit", "--config", "absent.yaml")
    assert "absent.yaml" in capsys.readouterr().err


def test_launch_that_would_hang_is_refused_before_it_starts(saflex, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    with pytest.raises(MisconfigurationException, match=r"it started 1\. Start them by `srun"):
        saflex("fit", "--config", SHIPPED, *SHORT, *two)
    assert not RUN.exists()
