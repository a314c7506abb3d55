"""``saflex-train``: every choice of every group takes a short run; a sweep ends with one table."""

import json
import os
import subprocess
import sys
from datetime import datetime
from inspect import Parameter, signature
from pathlib import Path
from typing import get_args, get_type_hints

import lightning as L
import pytest
import torch
from helpers.configs import CONFIGS, compose_config, groups_in_log, render
from helpers.standins import write_medmnist
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.transforms import v2

import saflex_lightning
from saflex_lightning.cli.report import make_run_table
from saflex_lightning.cli.sweep import make_sweep_table, read_results
from saflex_lightning.cli.train import main, train
from saflex_lightning.data import TagOperations
from saflex_lightning.fit.report import varying_metrics
from saflex_lightning.recipes.medmnist_sets import MEDMNIST_SETS

# Choices for tables and for CLIP, not for the images of the main job; see test_tabular.py and
# test_clip_configs.py.
ELSEWHERE = (
    *("saint", "tabular_cutmix", "tabular_cutmix_columns", "tabular_mlp"),
    *("clip_vit_b16", "clip_vit_b16_linear", "lp_ft", "zero_shot"),
)
GROUPS = {
    folder.name: sorted(
        file.stem
        for file in folder.glob("*.yaml")
        if file.stem not in ELSEWHERE and file.stem[0] != "_"  # what others begin with
    )
    for folder in sorted(CONFIGS.iterdir())
    if folder.is_dir() and folder.name not in {"experiment", "lightning_cli", "__pycache__"}
}
METHODS = (
    "label_smoothing",
    "learning_to_reweight",
    "no_aug",
    "saflex_gradient",
    "saflex_paper",
    "saflex_robust",
    "small_loss",
    "soft_augmentation",
    "train_plus_val",
    "uniform",
    "upstream",
)
DEFAULTS = {
    "augmentation": "randaugment",
    "batch": "union",
    "callbacks": "last",
    "data": "blood_subset",
    "debug": None,
    "logger": "csv",
    "method": "saflex_robust",
    "model": "resnet18",
    "trainer": "quick",
}
SHORT = (
    "data.batch_size=4",
    "data.eval_batch_size=128",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "++trainer.limit_train_batches=2",
    "++trainer.limit_val_batches=1",
    "++trainer.limit_test_batches=1",
)


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """Undo what ``seed_everything`` writes into the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def test_runs_that_start_in_the_same_second_have_a_folder_each(monkeypatch):
    monkeypatch.delenv("SAFLEX_RUN_DIR", raising=False)
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        jobs = [compose("train", return_hydra_config=True).hydra for _ in range(2)]
        for runs in ([job.run for job in jobs], [job.sweep for job in jobs]):
            assert runs[0].dir != runs[1].dir
            assert datetime.strptime(Path(runs[0].dir).name, "%H-%M-%S-%f")
            assert runs[0].dir == runs[0].dir  # the clock is read once a run


def test_groups_and_defaults_are_the_ones_the_tests_know(tmp_path):
    assert tuple(GROUPS["method"]) == METHODS
    assert DEFAULTS.keys() == GROUPS.keys()
    explicit = [f"{group}={choice}" for group, choice in DEFAULTS.items() if choice is not None]
    assert compose_config(tmp_path) == compose_config(tmp_path, *explicit)


# `callbacks=best` selects by the rows that steer; the callback says so.
@pytest.mark.filterwarnings("ignore:Expected rows that select checkpoints")
@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group in GROUPS
        for choice in GROUPS[group]
        if (group == "method" or choice != DEFAULTS[group])
        and group != "data"
        and choice != "soft_crop_weighted"
        # Weights that are a download, and image folders; tests/e2e/test_experiments.py has these.
        and choice not in {"generated", "resnet50"}
        and not choice.startswith("ddp_")  # tests/distributed/test_launchers.py has these
    ],
)
def test_every_choice_takes_a_short_run(tmp_path, group, choice):
    short = [item for item in SHORT if "val_batches" not in item or choice != "train_plus_val"]
    small = ["model=small_cnn"] if group != "model" else []
    cfg = compose_config(tmp_path, *small, f"{group}={choice}", *short)
    result = train(cfg)
    assert result["steps"] == 2
    assert 0.0 <= result["test_accuracy"] <= 1.0
    assert json.loads((tmp_path / "result.json").read_text()) == result
    saflex = "saflex" in cfg.callbacks
    varies = varying_metrics(instantiate(cfg.callbacks.saflex).settings) if saflex else []
    table = render(make_run_table(result))
    for name in ("kept_fraction", "relabelled_fraction", "effective_fraction"):
        assert (result[name] is not None) == (name in varies)
        assert name not in varies or 0.0 <= result[name] <= 1.0 + 1e-6
        assert (name.replace("_", " ") in table) == (name in varies)
    assert (result["step_seconds_without_solve"] < result["step_seconds"]) == saflex
    assert "test accuracy" in table
    assert (tmp_path / "csv" / "metrics.csv").is_file() == ((group, choice) != ("logger", "none"))
    weights = tmp_path / "checkpoints" / "last.ckpt"
    assert weights.is_file() == ((group, choice) != ("callbacks", "none"))
    if choice == "saflex_robust":
        operations = TagOperations(v2.RandAugment()).group_names[1:]
        assert sorted(groups_in_log(tmp_path)) == sorted(operations)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("data", [(), ("experiment=tabular_mlp", "data=qsar")])
def test_overfitting_one_batch_runs(tmp_path, data):
    cfg = compose_config(
        tmp_path, *data, *SHORT, "trainer.max_epochs=2", "+trainer.overfit_batches=1"
    )
    assert train(cfg)["steps"] == 2


def test_weighted_targets_below_saflex_are_refused(tmp_path):
    cfg = compose_config(tmp_path, "augmentation=soft_crop_weighted", *SHORT)
    with pytest.raises(ValueError, match="`target` to be probabilities that sum to 1"):
        train(cfg)


@pytest.mark.parametrize("name", MEDMNIST_SETS)
def test_official_sets_compose_with_a_model_that_fits(tmp_path, name):
    write_medmnist(tmp_path, name)
    overrides = (f"data.root={tmp_path}", "data.check_md5=false", "data.batch_size=2")
    cfg = compose_config(tmp_path, f"data={name}mnist", *overrides)
    data, model = instantiate(cfg.data), instantiate(cfg.model)
    data.setup("fit")
    model.build(data.sizes())
    images, _ = next(iter(data.train_dataloader()))[:2]
    assert model(images).shape == (4, MEDMNIST_SETS[name].num_classes)


@pytest.mark.parametrize(
    ("method", "augmentation"),
    [
        (method, augmentation)
        for augmentation in sorted({*GROUPS["augmentation"]} - {"generated"})
        for method in METHODS
        # Most methods leave the augmentation alone, whichever it is.
        if augmentation == "mixup" or method in {"no_aug", "soft_augmentation", "saflex_robust"}
    ],
)
def test_combinations_compose_and_instantiate(tmp_path, method, augmentation):
    cfg = compose_config(tmp_path, f"method={method}", f"augmentation={augmentation}")
    assert cfg.name == method
    assert isinstance(instantiate(cfg.data), L.LightningDataModule)
    # What the command line says wins, but no augmentation is none in every row of a sweep.
    chosen = "none" if method == "no_aug" else augmentation.removesuffix("_weighted")
    assert cfg.data.augmentation == chosen
    assert method != "no_aug" or cfg.data.augmentation_settings is None
    kinds = [type(instantiate(callback)) for callback in cfg.callbacks.values()]
    assert kinds in ([ModelCheckpoint], [ModelCheckpoint, saflex_lightning.SAflexCallback])


@pytest.mark.parametrize(
    ("method", "augmentation", "batch", "preset"),
    [
        ("no_aug", "none", "union", None),
        ("upstream", "randaugment", "replace", None),
        ("uniform", "randaugment", "union", None),
        ("label_smoothing", "randaugment", "union", None),
        ("small_loss", "randaugment", "union", None),
        ("train_plus_val", "randaugment", "union", None),
        ("soft_augmentation", "soft_crop", "replace", None),
        ("learning_to_reweight", "randaugment", "union", "paper"),
        ("saflex_paper", "randaugment", "union", "paper"),
        ("saflex_gradient", "randaugment", "union", "gradient"),
        ("saflex_robust", "randaugment", "union", "robust"),
    ],
)
def test_what_a_method_means(tmp_path, method, augmentation, batch, preset):
    cfg = compose_config(tmp_path, f"method={method}")
    assert cfg.data.augmentation == augmentation
    assert cfg.data.batch == batch
    assert cfg.callbacks.get("saflex", {}).get("preset") == preset


def test_the_command_line_can_change_every_setting_of_the_callback(tmp_path):
    """`callbacks.saflex.SETTING=...` without a `+`; null, or the default, until then."""
    listed = dict(compose_config(tmp_path).callbacks.saflex)
    assert listed.pop("_target_") == "saflex_lightning.SAflexCallback"
    assert listed == settings_of(saflex_lightning.SAflexCallback)
    changed = compose_config(tmp_path, "callbacks.saflex.label_rule=keep", "method=saflex_paper")
    assert changed.callbacks.saflex.label_rule == "keep"


def settings_of(kind):
    """Keywords with their defaults; those of an unpacked TypedDict are None until they are set."""
    parameters = dict(signature(kind).parameters)
    del parameters["val_dataloader"]  # no text says it
    settings = {}
    for name, parameter in parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            (unpacked,) = get_args(get_type_hints(kind.__init__, include_extras=True)[name])
            settings |= dict.fromkeys(get_type_hints(unpacked))
        else:
            settings[name] = parameter.default
    return settings


def test_methods_take_the_same_number_of_steps(tmp_path):
    steps = {}
    for method in METHODS:
        data = instantiate(compose_config(tmp_path, f"method={method}").data)
        data.setup("fit")
        steps[method] = len(data.train_dataloader())
    assert steps.pop("train_plus_val") == (1200 + 400) // 64
    assert set(steps.values()) == {1200 // 64}


@pytest.mark.parametrize("seed", ["null", "-1", str(2**32), "0.5"])
def test_what_is_no_seed_is_refused_before_anything_is_made(tmp_path, seed):
    cfg = compose_config(tmp_path, f"seed={seed}", "data.path=/nowhere")
    with pytest.raises(ValueError, match="Expected `seed` to be an integer from 0 to 4294967295"):
        train(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.merge_val=true", "data.steering=train"),
        ("+trainer.limit_val_batches=0",),
    ],
)
def test_an_epoch_is_not_selected_by_rows_that_are_not_there(tmp_path, overrides, monkeypatch):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("has trained"))
    cfg = compose_config(tmp_path, "callbacks=best", *overrides)
    with pytest.raises(MisconfigurationException, match=r"select an epoch by.*`callbacks=last`"):
        train(cfg)


def test_an_epoch_is_not_selected_where_none_is_validated(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("has trained"))
    overrides = "++trainer.check_val_every_n_epoch=5", "trainer.max_epochs=4"
    cfg = compose_config(tmp_path, "callbacks=best", *overrides)
    with pytest.raises(MisconfigurationException, match="the first would be number 5 of 4"):
        train(cfg)


@pytest.mark.parametrize("override", ["check_val_every_n_epoch=2", "limit_val_batches=0"])
def test_the_last_epoch_is_kept_without_validation_in_it(tmp_path, override):
    overrides = "trainer.max_epochs=3", f"++trainer.{override}", "method=upstream"
    result = train(compose_config(tmp_path, *SHORT, *overrides))
    file = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(file, weights_only=False)["global_step"] == result["steps"]


@pytest.mark.parametrize("folder", ["one", "runs/${seed}", None])
def test_jobs_of_a_sweep_have_folders_of_their_own(folder, monkeypatch):
    given = [] if folder is None else [f"output_dir={folder}"]
    ran = []
    monkeypatch.setattr("saflex_lightning.cli.train.train", ran.append)
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        cfg = compose("train", given, return_hydra_config=True)
        cfg.hydra.mode = RunMode.MULTIRUN
        cfg.hydra.runtime.output_dir = "multirun/0"
        HydraConfig.instance().set_config(cfg)
        try:
            if folder == "one":
                with pytest.raises(
                    ValueError, match=r"output_dir=one for all\. Pass `hydra\.sweep"
                ):
                    main.__wrapped__(compose("train", given))
            else:
                main.__wrapped__(compose("train", given))
        finally:
            HydraConfig.instance().cfg = None
    assert len(ran) == (folder != "one")


def test_same_seed_same_result(tmp_path):
    first = train(compose_config(tmp_path / "a", "seed=5", *SHORT))
    again = train(compose_config(tmp_path / "b", "seed=5", *SHORT))
    other = train(compose_config(tmp_path / "c", "seed=6", *SHORT))
    assert first["test_auroc"] == again["test_auroc"]
    assert first["test_auroc"] != other["test_auroc"]


def test_every_leaf_has_a_comment():
    """On its line, on the line above, or beside the key of the mapping it is in."""
    for file in CONFIGS.rglob("*.yaml"):
        above, covered = "", None
        for line in file.read_text().splitlines():
            indent = len(line) - len(line.lstrip())
            key, _, value = line.strip().removeprefix("- ").partition(":")
            if covered is not None and indent <= covered:
                covered = None
            if covered is None and value.strip().startswith("#"):
                covered = indent
            is_leaf = bool(value.strip()) and not line.lstrip().startswith("#")
            if is_leaf and key not in {"_target_", "class_path"}:
                commented = " # " in line or above.startswith("#") or key.startswith("override ")
                assert commented or covered is not None, f"{file.name}: {line}"
            above = line


# Each is markup, a link, an emoji or an unbalanced bracket to what prints tables.
ODD_NAMES = [
    "[/x]",
    "[bold]",
    "[red]a[/red]",
    "a [link=x]",
    ":smile:",
    "[",
    "\\[x]",
    "[[a]]",
    "[@click=f()]",
]


def write_result(folder, name, seed, accuracy, *overrides):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    result = {"name": name, "seed": seed, "test_accuracy": accuracy, "test_auroc": 0.9}
    (folder / "result.json").write_text(json.dumps(result))


class TestSweepTable:
    def test_rows_are_methods(self, tmp_path):
        write_result(tmp_path / "0", "upstream", 1, 0.80, "method=upstream", "seed=1", "a=1")
        write_result(tmp_path / "1", "upstream", 2, 0.84, "method=upstream", "seed=2", "a=1")
        write_result(tmp_path / "2", "uniform", 1, 0.85, "method=uniform", "seed=1", "a=1")
        lines = render(make_sweep_table(read_results(tmp_path))).splitlines()
        row = next(line for line in lines if "upstream" in line)
        assert "82.00 ± 2.83" in row
        assert "0.9000 ± 0.0000" in row
        assert " 2 " in row
        assert "±" not in next(line for line in lines if "uniform" in line)
        assert not any("a=1" in line for line in lines)

    def test_other_settings_that_differ_get_their_own_row(self, tmp_path):
        write_result(tmp_path / "0", "uniform", 1, 0.80, "model.lr=0.1", "seed=1")
        write_result(tmp_path / "1", "uniform", 1, 0.84, "model.lr=0.2", "seed=1")
        table = render(make_sweep_table(read_results(tmp_path)))
        assert "uniform model.lr=0.1" in table
        assert "uniform model.lr=0.2" in table

    def test_metrics_that_a_run_lacks_are_dashes(self):
        text = render(make_sweep_table([{"name": "flyp", "overrides": [], "test_f1": 0.5}]))
        assert "-" in next(line for line in text.splitlines() if "flyp" in line)

    def test_results_of_an_earlier_sweep_are_left_out(self, tmp_path):
        write_result(tmp_path / "0", "uniform", 1, 0.80)
        write_result(tmp_path / "1", "uniform", 2, 0.84)
        os.utime(tmp_path / "0" / "result.json", (1000.0, 1000.0))
        assert [result["seed"] for result in read_results(tmp_path, since=2000.0)] == [2]

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_names_and_overrides_are_printed_as_they_are(self, tmp_path, name):
        override = "+callbacks.saflex.params=[net.2.*]"
        write_result(tmp_path / "0", name, 1, 0.80, override)
        write_result(tmp_path / "1", name, 1, 0.84, "+callbacks.saflex.params=[head.*]")
        table = render(make_sweep_table(read_results(tmp_path)))
        assert f"{name} {override}" in table
        assert f"{name} +callbacks.saflex.params=[head.*]" in table
        result = {"name": name, "seed": 1, "test_accuracy": 0.5}
        assert f" {name} " in render(make_run_table(result))

    @pytest.mark.parametrize("text", ["", "{", '{"name": "a"', "\0"])
    def test_a_result_that_was_cut_short_is_named(self, tmp_path, text):
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"Expected .*0/result\.json to hold the result of"):
            read_results(tmp_path)


@pytest.mark.slow
def test_sweep_prints_one_summary(tmp_path):
    source = str(Path(saflex_lightning.__file__).parents[1])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "saflex_lightning.cli.train", "-m"),
            *("method=no_aug,saflex_robust", "model=small_cnn", "hydra.sweep.dir=sweep", *SHORT),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mean ± std over seeds") == 1
    summary = run.stdout[run.stdout.index("mean ± std over seeds") :]
    assert "no_aug" in summary
    assert "saflex_robust" in summary
    assert "Warning" not in run.stderr
    results = read_results(tmp_path / "sweep")
    assert [result["name"] for result in results] == ["no_aug", "saflex_robust"]


def test_tasks_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(MisconfigurationException, match=r"it started 2\. Start them by `torchrun"):
        train(compose_config(tmp_path, *SHORT))
    assert not (tmp_path / "result.json").exists()
