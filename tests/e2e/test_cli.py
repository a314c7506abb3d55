"""``saflex``: driven with arguments in a clean directory."""

import os
import re
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

import saflex_lightning
from saflex_lightning.cli import find_config, main

CONFIGS = Path(str(resources.files("saflex_lightning.configs")))
# Rows of the table of methods by LightningCLI: the method, and what makes it of `saflex_robust`.
ARGUMENTS = dict(
    re.findall(r"^\| `(\w+)` \| `(--.*)` \|$", (CONFIGS / "README.md").read_text(), re.M)
)
SHORTLY = ("gates_only", "small_loss")
SHIPPED = "configs/lightning_cli/blood_randaugment.yaml"
RUN = Path("outputs/blood_randaugment")
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

    (checkpoint,) = (RUN / "version_0" / "checkpoints").glob("*.ckpt")
    saflex("test", f"--config={SHIPPED}", *SHORT, "--ckpt_path", str(checkpoint))
    saflex("fit", "--config", str(saved))
    assert (RUN / "version_2" / "config.yaml").is_file()


def test_saved_config_may_be_written_twice_into_one_directory(saflex):
    args = ("fit", "-c", SHIPPED, *SHORT, "--trainer.max_epochs=1", "--trainer.logger=false")
    saflex(*args, "--trainer.enable_checkpointing=false")
    saflex(*args, "--trainer.enable_checkpointing=false")
    assert Path("config.yaml").is_file()


def test_callback_is_added_by_class_path(saflex):
    saflex(
        "fit",
        *("--model=saflex_lightning.recipes.Classifier", "--model.lr=0.01"),
        *("--model.network=saflex_lightning.recipes.ResNet18", "--model.num_classes=8"),
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


@pytest.mark.parametrize(
    ("file", "on_cpu", "overrides"),
    [
        (SHIPPED, ["accelerator=cpu"], []),
        (
            "configs/lightning_cli/medmnist_randaugment.yaml",
            ["accelerator=cpu"],
            ["experiment=medmnist_randaugment"],
        ),
        (
            "configs/lightning_cli/medmnist_4gpu_fp16.yaml",
            ["accelerator=cpu", "precision=32"],
            [
                *("experiment=medmnist_randaugment", "trainer=ddp_4gpu", "data.batch_size=32"),
                *("data.steering=split", "data.num_workers=4"),
            ],
        ),
        *(
            (f"configs/lightning_cli/{name}.yaml", ["accelerator=cpu"], [f"experiment={name}"])
            for name in ("tabular_mlp", "tabular_saint")
        ),
    ],
    ids=["main job", "experiment", "four GPUs", "perceptron", "SAINT"],
)
def test_same_objects_as_a_job_of_hydra(tmp_path, monkeypatch, file, on_cpu, overrides):
    monkeypatch.setattr(sys, "argv", ["saflex"])  # LightningCLI warns about arguments given twice
    cli = LightningCLI(
        args=["--config", find_config(file), *(f"--trainer.{setting}" for setting in on_cpu)],
        run=False,
        auto_configure_optimizers=False,
    )
    with initialize_config_module(config_module="saflex_lightning.configs", version_base="1.3"):
        settings = [f"output_dir={tmp_path}", *(f"trainer.{setting}" for setting in on_cpu)]
        cfg = compose("train", overrides=[*overrides, *settings])
    data, model = instantiate(cfg.data), instantiate(cfg.model)
    saflex = instantiate(cfg.callbacks.saflex)
    trainer = instantiate(cfg.trainer)

    assert cli.config.seed_everything == cfg.seed
    assert type(cli.datamodule) is type(data)
    assert plain(cli.datamodule) == plain(data)
    assert type(cli.model) is type(model)
    settings = {key: value for key, value in cli.model.hparams.items() if key[0] != "_"}
    assert settings == dict(model.hparams)
    assert str(cli.model) == str(model)

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


@pytest.mark.parametrize(
    ("method", "experiment"),
    [
        pytest.param(*case, marks=() if short else pytest.mark.slow)
        for *case, short in (
            *((method, "tabular_mlp", method in SHORTLY) for method in ARGUMENTS),
            *((method, "blood_generated", False) for method in ARGUMENTS),
            *((method, "medmnist_randaugment", False) for method in ARGUMENTS),
        )
    ],
)
def test_methods_of_the_readme_are_those_of_hydra(tmp_path, monkeypatch, method, experiment):
    monkeypatch.setattr(sys, "argv", ["saflex"])
    file = find_config(f"configs/lightning_cli/{experiment}.yaml")
    arguments = ["--config", file, "--trainer.accelerator=cpu", *ARGUMENTS[method].split()]
    cli = LightningCLI(args=arguments, run=False, auto_configure_optimizers=False)
    with initialize_config_module(config_module="saflex_lightning.configs", version_base="1.3"):
        overrides = [f"experiment={experiment}", f"method={method}", f"output_dir={tmp_path}"]
        cfg = compose("train", overrides=overrides)
    data, model = instantiate(cfg.data), instantiate(cfg.model)
    assert plain(cli.datamodule) == plain(data)
    assert cli.datamodule.augmentation_settings == data.augmentation_settings
    assert {key: cli.model.hparams[key] for key in model.hparams} == dict(model.hparams)
    expected = [instantiate(cfg.callbacks.saflex)] if "saflex" in cfg.callbacks else []
    found = [c for c in cli.trainer.callbacks if isinstance(c, saflex_lightning.SAflexCallback)]
    assert [plain(callback) for callback in found] == [plain(callback) for callback in expected]
    assert [callback.preset for callback in found] == [callback.preset for callback in expected]
    assert cli.trainer.limit_val_batches == cfg.trainer.get("limit_val_batches", 1.0)


class TestFindConfig:
    packaged = str(CONFIGS / "lightning_cli" / "blood_randaugment.yaml")

    @pytest.mark.parametrize("name", [SHIPPED, f".{os.sep}{SHIPPED}", SHIPPED[len("configs/") :]])
    def test_shipped_file_is_found_from_anywhere(self, name):
        assert find_config(name) == self.packaged

    def test_a_file_that_exists_wins(self, tmp_path):
        (tmp_path / "configs" / "lightning_cli").mkdir(parents=True)
        (tmp_path / SHIPPED).write_text("")
        assert find_config(SHIPPED) == SHIPPED

    def test_other_names_are_left_to_the_parser(self):
        assert find_config("mine.yaml") == "mine.yaml"


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
    with pytest.raises(MisconfigurationException, match="Expected `srun` to start 2 processes"):
        saflex("fit", "--config", SHIPPED, *SHORT, *two)
    assert not RUN.exists()
