"""Every experiment composes, instantiates and takes one fast run on a small stand-in of its data.

A new file in ``configs/experiment`` joins by itself. If its data cannot be had without a download,
write a function that makes small files in the same format, and enter it in
``helpers.standins.STANDINS`` under the first word of the experiment's name (up to the first
underscore). It gets an empty folder and returns the overrides that point the experiment at its
files; sizes that only make the run long (batch size, workers, network width) belong there too.
"""

import json
import re

import lightning as L
import pytest
from helpers.benchmarks import load_benchmark
from helpers.configs import CONFIGS, compose_config, groups_in_log, render
from helpers.standins import STANDINS
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from saflex_lightning.cli.report import make_run_table
from saflex_lightning.cli.sweep import read_results
from saflex_lightning.cli.train import train

paper_tables = load_benchmark("paper")
make_paper_tables, paper_cell = paper_tables.make_paper_tables, paper_tables.paper_cell
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
# They differ from another one in a few settings.
LIKE_ANOTHER = ("clip_flyp", "iwildcam_generated", "medmnist_crop", "medmnist_mixup")
POOL_PROMPTS = ("at_night", "in_the_rain")
QUIET = ("debug=fast", "trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Overrides for an experiment; files of one kind are written once."""
    made = {}

    def overrides(experiment):
        kind = experiment.split("_")[0]
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = STANDINS[kind](folder) if kind in STANDINS else []
        return [f"experiment={experiment}", *made[kind], *QUIET]

    return overrides


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """Undo what ``seed_everything`` writes into the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


# The validation rows select an epoch and steer, as in the protocols; the callback says so.
@pytest.mark.filterwarnings("ignore:Expected rows that select checkpoints")
@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_ANOTHER else ())
        for name in EXPERIMENTS
    ],
)
def test_fast_run_on_a_standin(tmp_path, standin, experiment):
    pairs = ["method=saflex_gradient"] if experiment.startswith("clip") else []
    cfg = compose_config(tmp_path, *standin(experiment), *pairs)
    result = train(cfg)
    assert result["steps"] == 2
    assert json.loads((tmp_path / "result.json").read_text()) == result
    for cell in (result["paper"] or {"cells": []})["cells"]:
        assert 0.0 <= result[cell["metric"]] <= 1.0
        own = f"{100 * result[cell['metric']]:.2f} (1)"
        tables = "".join(render(table) for table in make_paper_tables(read_results(tmp_path)))
        assert own in tables


@pytest.mark.parametrize(
    "method",
    [
        "saflex_robust",
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (
                *("label_smoothing", "learning_to_reweight", "no_aug", "saflex_gradient"),
                *("small_loss", "soft_augmentation", "train_plus_val", "upstream"),
            )
        ),
    ],
)
def test_methods_on_a_pool_of_generated_images(tmp_path, standin, method):
    no_rows = ["trainer.limit_val_batches=0"] if method == "train_plus_val" else []
    cfg = compose_config(tmp_path, *standin("blood_generated"), f"method={method}", *no_rows)
    assert train(cfg)["steps"] == 2
    pooled = method not in {"no_aug", "soft_augmentation"}
    assert (cfg.data.augmentation == "generated") == pooled
    if method == "saflex_robust":  # one for each prompt
        names = [f"pool: {prompt}/strength-0.6_guidance-7.5" for prompt in POOL_PROMPTS]
        assert sorted(groups_in_log(tmp_path)) == names


def test_overfitting_batches_of_a_pool_repeats_them(tmp_path, standin):
    seen = []

    class Recorder(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((batch_idx, batch.index.tolist(), batch.augmented.sum().item()))

    cfg = compose_config(
        tmp_path,
        *standin("blood_generated"),
        *("++trainer.max_epochs=2", "~trainer.limit_train_batches", "+trainer.overfit_batches=2"),
    )
    trainer = instantiate(cfg.trainer, callbacks=[Recorder()], logger=False)
    trainer.fit(instantiate(cfg.model), instantiate(cfg.data))
    assert [step[0] for step in seen] == [0, 1, 0, 1]
    assert seen[:2] == seen[2:]
    assert seen[0][1] != seen[1][1]
    assert all(augmented > 0 for _, _, augmented in seen)


def test_planted_labels_of_a_pool_are_scored(tmp_path, standin):
    cfg = compose_config(
        tmp_path,
        *standin("blood_generated"),
        *("method=saflex_robust", "data.label_noise=0.4", "++trainer.limit_train_batches=3"),
    )
    result = train(cfg)
    assert 0.0 < result["wrong_label_auroc"] < 1.0
    assert "AUROC of planted wrong labels" in render(make_run_table(result))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_method_composes_and_instantiates(tmp_path, standin, experiment):
    paper = compose_config(tmp_path, *standin(experiment)).paper
    for method in paper.rows if paper else ("upstream", "saflex_robust"):
        cfg = compose_config(tmp_path, *standin(experiment), f"method={method}")
        assert cfg.name == method
        instantiate(cfg.data)
        for callback in cfg.callbacks.values():
            instantiate(callback)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_file_is_a_short_diff_with_its_command_on_top(experiment):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert len(lines) < 40
    assert lines[0] == "# @package _global_"
    head = "\n".join(lines[: lines.index("defaults:")])
    assert f"experiment={experiment}" in head
    assert "Table " in head or "Figure " in head or experiment == "weak_labels"


def read_commands(experiment):
    """Yield the overrides of each command on top of an experiment, as its first job has them."""
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    for command in re.findall(r"#   saflex-train (.+)", text.replace("\\\n#", "")):
        overrides = OverridesParser.create().parse_overrides(command.removeprefix("-m ").split())
        yield [
            f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else override.input_line
            for override in overrides
            if not override.key_or_group.startswith("hydra.")
        ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_commands_on_top_compose(tmp_path, experiment):
    commands = list(read_commands(experiment))
    assert commands
    for overrides in commands:
        assert f"experiment={experiment}" in overrides
        compose_config(tmp_path, *overrides)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_rows_stand_beside_cells_that_the_paper_has(tmp_path, standin, experiment):
    paper = compose_config(tmp_path, *standin(experiment)).paper
    if paper is None:  # a figure
        return
    paper_tables.check_paper(paper)
    named = [row for row in paper.rows.values() if row is not None]
    assert named
    for cell in paper.cells:
        assert any(paper_cell(row, cell.column) is not None for row in named)
