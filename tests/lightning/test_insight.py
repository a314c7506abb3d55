"""`SAflexInsight`: every number against plain loops, what is written, and when."""

import math
import sys
from collections import defaultdict
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.adopted import Unedited
from helpers.grouped import NAMES, Grouped, grouped_loader, steering
from helpers.insight import collect, collect_and_fit, grouped_run, read_csv, sums_by_loops, visits
from helpers.processes import run_in_processes
from helpers.training import Classifier, assert_same_state, fit, make_rows, seeded, state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback, SAflexInsight, SAflexWarning
from saflex_lightning.data import with_index
from saflex_lightning.data.cells import from_cell
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.insight.collect import Collector, WeightHistory
from saflex_lightning.insight.images import DoubtedImages
from saflex_lightning.step import StepRows

TABLES = ("saflex_classes.csv", "saflex_groups.csv", "saflex_history.csv", "saflex_rows.csv")
SHARES = ("rows", "mean_weight", "mean_belief", "doubted")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback, recorder, _ = grouped_run(folder)
    return folder, callback, recorder.steps


def numbers(row, names=SHARES):
    return [float(row[name]) for name in names]


def test_groups_and_classes_are_what_loops_add_up(run):
    folder, _, steps = run
    by_group = sums_by_loops(steps, lambda group, label: NAMES[group])
    groups = read_csv(folder, "groups")
    assert {row["name"] for row in groups} == set(by_group) == {"generate", "mislabel"}
    for row in groups:
        assert numbers(row) == pytest.approx(by_group[row["name"]], rel=1e-4)
    by_class = sums_by_loops(steps, lambda group, label: (NAMES[group], str(label)))
    classes = read_csv(folder, "classes")
    assert len(classes) == len(by_class)
    for row in classes:
        assert numbers(row) == pytest.approx(by_class[row["group"], row["given"]], rel=1e-4)


def test_rows_are_what_loops_add_up_with_the_most_doubted_first(run):
    folder, callback, steps = run
    expected, weights = {}, defaultdict(list)
    for _, index, group, label, suggested, belief, weight in visits(steps):
        expected[index] = (label, NAMES[group], suggested, belief)
        weights[index].append(weight)
    rows = read_csv(folder, "rows")
    assert len(rows) == len(expected)
    for row in rows:
        label, group, suggested, belief = expected[int(row["index"])]
        weight = weights[int(row["index"])]
        fading = [0.7**later for later in reversed(range(len(weight)))]
        assert (row["given"], row["suggested"]) == (str(label), str(suggested))
        assert (row["group"], int(row["visits"])) == (group, len(weight))
        found = numbers(row, ("belief", "mean_weight"))
        assert found == pytest.approx([belief, np.average(weight, weights=fading)], rel=1e-4)
    beliefs = [float(row["belief"]) for row in rows]
    assert beliefs == sorted(beliefs)
    known = callback.read_row_evidence()
    evidence = dict(zip(known.index.tolist(), known.evidence.tolist(), strict=True))
    for row in rows:
        assert float(row["belief"]) == pytest.approx(evidence[int(row["index"])], rel=1e-4)


def test_evidence_and_shares_of_wrong_labels_are_those_of_the_callback(run):
    folder, callback, _ = run
    found = callback.read_group_evidence()
    assert found.names == NAMES
    for row in read_csv(folder, "groups"):
        group = int(row["group"])
        expected = [float(part[group]) for part in (found.wrong_labels, found.mean, found.error)]
        assert numbers(row, ("wrong_labels", "evidence", "standard_error")) == pytest.approx(
            expected, rel=1e-4
        )
    assert read_csv(folder, "groups")[0]["verdict"] == "harms"


def test_history_has_every_epoch(run):
    folder, _, steps = run
    history = read_csv(folder, "history")
    assert [int(row["step"]) for row in history] == [6 * (n // 2 + 1) for n in range(24)]
    first = sums_by_loops(steps[:6], lambda group, label: NAMES[group])
    for row in history[:2]:
        assert float(row["mean_weight"]) == pytest.approx(first[row["group"]][1], rel=1e-4)


def test_figures_lie_beside_the_tables(run):
    folder, _, _ = run
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"saflex_groups.png", "saflex_labels.png", "saflex_weights.png"}
    assert {path.name for path in folder.glob("*.csv")} == set(TABLES)


def test_training_is_the_same_without_it(tmp_path):
    modules = [seeded(Grouped), seeded(Grouped)]
    for module, insight in zip(modules, ([], [SAflexInsight(tmp_path)]), strict=True):
        callback = SAflexCallback(steering())
        fit(module, callback, *insight, train=grouped_loader(shuffle=True), max_epochs=4)
    assert_same_state(*map(state_of, modules))


# Processes


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    states = run_in_processes(collect_and_fit, 2, 2, tmp_path)
    for state in states:
        assert_equal(state, collect(0, 1))
    groups = read_csv(tmp_path, "groups")
    assert sum(int(row["rows"]) for row in groups) == 3 * 96  # of both ranks, and each once
    rows = read_csv(tmp_path, "rows")
    assert sum(int(row["visits"]) for row in rows) == 3 * 96
    assert len({row["index"] for row in rows}) == len(rows)


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            assert_equal(found[name], part)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert found == expected


# The end of a fit


class Failing(Grouped):
    """Fails in its 20th step."""

    error = RuntimeError("the disk is gone")

    def training_step(self, batch, batch_idx):
        if self.global_step == 20:
            raise self.error
        return super().training_step(batch, batch_idx)


class Interrupted(Failing):
    error = KeyboardInterrupt()


@pytest.mark.parametrize("module", [Failing, Interrupted])
def test_an_error_keeps_what_was_learned(module, tmp_path):
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        grouped_run(tmp_path, module=seeded(module))
    assert {path.name for path in tmp_path.glob("*.csv")} == set(TABLES)
    assert sum(int(row["rows"]) for row in read_csv(tmp_path, "groups")) == 20 * 16


def test_an_error_is_not_hidden_by_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.warns(SAflexWarning, match=r"Expected to write .* Pass a folder"),
        pytest.raises(RuntimeError, match="the disk is gone"),
    ):
        grouped_run(tmp_path / "file", module=seeded(Failing))


def test_a_resumed_run_has_the_tables_of_an_uninterrupted_one(tmp_path):
    def run(name, **kwargs):
        return fit(
            seeded(partial(Grouped, plain=True)),
            SAflexCallback(steering()),
            SAflexInsight(tmp_path / name),
            train=grouped_loader(),
            **kwargs,
        )

    run("whole", max_epochs=6)
    run("first", max_epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    run("second", max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    for name in ("groups", "classes", "rows", "history"):
        assert read_csv(tmp_path / "second", name) == read_csv(tmp_path / "whole", name)


def test_the_folder_is_that_of_the_logger(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path, name="runs", version="first")
    callbacks = (SAflexCallback(steering()), SAflexInsight(figures=False))
    fit(Grouped(), *callbacks, train=grouped_loader(), max_epochs=1, logger=logger)
    assert (tmp_path / "runs" / "first" / "saflex_groups.csv").is_file()
    assert not list(tmp_path.rglob("*.png"))


def test_the_table_of_groups_is_printed(tmp_path, capsys):
    grouped_run(tmp_path, max_epochs=2)
    printed = capsys.readouterr().out
    assert "mislabel" in printed
    assert "Tables of rows and groups: " in printed


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    callbacks = (SAflexCallback(steering()), SAflexInsight(tmp_path))
    fit(Grouped(), *callbacks, train=grouped_loader(), max_epochs=1, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["saflex/groups", "saflex/weights", "saflex/labels"]
    for name in events.Tags()["images"]:
        (image,) = events.Images(name)
        assert image.step == 6
        assert min(image.width, image.height) > 100


@pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves
def test_mlflow_gets_the_figures(tmp_path):
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/runs.db"
    logger = pl.loggers.MLFlowLogger("saflex", tracking_uri=uri, artifact_location=str(tmp_path))
    callbacks = (SAflexCallback(steering()), SAflexInsight(tmp_path / "tables"))
    fit(Grouped(), *callbacks, train=grouped_loader(), max_epochs=1, logger=logger)
    files = logger.experiment.list_artifacts(logger.run_id, "saflex")
    assert {file.path for file in files} == {
        f"saflex/{name}.png" for name in ("groups", "weights", "labels")
    }


@pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves
def test_offline_weights_and_biases_get_the_figures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    try:
        callbacks = (SAflexCallback(steering()), SAflexInsight(tmp_path / "tables"))
        fit(Grouped(), *callbacks, train=grouped_loader(), max_epochs=1, logger=logger)
    finally:
        wandb.finish()
    files = [file.name for file in tmp_path.rglob("media/images/saflex/*.png")]
    assert {name.split("_")[0] for name in files} == {"groups", "weights", "labels"}


def test_without_matplotlib_there_are_tables_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO"):
        grouped_run(tmp_path, max_epochs=2)
    assert {path.name for path in tmp_path.glob("*.csv")} == set(TABLES)
    assert not list(tmp_path.glob("*.png"))
    assert caplog.text.count("matplotlib is not installed") == 1


def test_parquet_has_the_rows_too(run):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, _, _ = run
    table = parquet.read_table(folder / "saflex_rows.parquet")
    rows = read_csv(folder, "rows")
    assert table.column_names == list(rows[0])
    for found, row in zip(table.to_pylist(), rows, strict=True):
        assert (found["index"], found["visits"]) == (int(row["index"]), int(row["visits"]))
        for name in ("given", "suggested", "group"):
            assert found[name] == from_cell(row[name])
        for name in ("belief", "mean_weight"):
            assert found[name] == pytest.approx(float(row[name]), rel=1e-5)


# What rows tell


@pytest.mark.parametrize("module", [Classifier, Unedited])
def test_a_plain_dataset_gets_an_identity(module, tmp_path):
    callback = SAflexCallback(steering())
    insight = SAflexInsight(tmp_path, class_names=["a", "b", "c", "=d"])
    dataset = with_index(TensorDataset(*make_rows(96)))
    loader = DataLoader(dataset, 16, shuffle=True, collate_fn=dataset.collate)
    fit(seeded(module), callback, insight, train=loader, max_epochs=6)
    rows = read_csv(tmp_path, "rows")
    assert sorted(int(row["index"]) for row in rows) == list(range(96))
    _, target = make_rows(96)
    for row in rows:
        assert from_cell(row["given"]) == insight.class_names[target[int(row["index"])]]
    (group,) = read_csv(tmp_path, "groups")
    assert (group["name"], group["verdict"], group["evidence"]) == ("augmented", "not judged", "")


def test_rows_without_identity_count_in_their_group(tmp_path):
    loader = DataLoader(TensorDataset(*make_rows(64)), 16)
    callbacks = (SAflexCallback(steering()), SAflexInsight(tmp_path))
    fit(seeded(Classifier), *callbacks, train=loader, max_epochs=2)
    assert not (tmp_path / "saflex_rows.csv").exists()
    assert [row["rows"] for row in read_csv(tmp_path, "groups")] == ["128"]


@pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns")
@pytest.mark.parametrize("preset", ["paper", "gradient"])
def test_without_evidence_labels_are_suggested_by_the_solve(preset, tmp_path):
    _, recorder, _ = grouped_run(tmp_path, max_epochs=2, preset=preset)
    for row in read_csv(tmp_path, "groups"):
        expected = sums_by_loops(recorder.steps, lambda group, label: NAMES[group])[row["name"]]
        found = numbers(row, ("rows", "mean_weight", "doubted"))
        assert found == pytest.approx([*expected[:2], expected[3]], rel=1e-4)
        assert (row["mean_belief"], row["verdict"]) == ("", "not judged")


class Named(Grouped):
    names = ("clean", "=HYPERLINK()", "[bold]$x$")


def test_names_are_no_formulas_in_files_tables_or_figures(tmp_path, capsys):
    grouped_run(tmp_path, max_epochs=2, module=seeded(Named))
    names = {row["name"] for row in read_csv(tmp_path, "groups")}
    assert names == {"'=HYPERLINK()", "[bold]$x$"}
    assert "[bold]$x$" in capsys.readouterr().out


# Bounds


def test_rows_beyond_the_bound_count_in_their_groups(tmp_path):
    insight = SAflexInsight(tmp_path, max_rows=10)
    with pytest.warns(SAflexWarning, match="Expected at most 10 rows"):
        fit(Grouped(), SAflexCallback(steering()), insight, train=grouped_loader(), max_epochs=2)
    assert len(read_csv(tmp_path, "rows")) == 10
    assert sum(int(row["rows"]) for row in read_csv(tmp_path, "groups")) == 2 * 96


def test_the_history_is_thinned():
    history, collector = WeightHistory(), Collector(1)
    collector.history = history
    ones = torch.ones(4, dtype=torch.bool)
    rows = StepRows(None, ones.long(), ones.long(), None, None, torch.ones(4), ones)
    for step in range(5000):
        collector.add(rows)
        collector.flush(Ranks(), step)
    assert 256 <= len(history.points) <= 512
    steps = [point[0] for point in history.points]
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert history.histogram.sum() == 4 * 5000
    assert math.isclose(history.points[-1][2], 1)


def test_images_are_those_whose_newest_label_is_doubted_most():
    collector, images = Collector(100), DoubtedImages()
    ranks = Ranks()
    ones = torch.ones(3, dtype=torch.bool)

    def step(index, beliefs, suggested):
        rows = StepRows(
            torch.tensor(index),
            ones.long(),
            torch.zeros(3, dtype=torch.long),
            torch.tensor(suggested),
            torch.tensor(beliefs),
            torch.ones(3),
            ones,
        )
        batch = (torch.tensor(index).reshape(3, 1, 1, 1).expand(3, 3, 2, 2), rows.target)
        images.add(batch, rows)
        collector.add(rows)
        collector.flush(ranks, 0)
        images.flush(collector.table)

    step([1, 2, 3], [0.1, 0.5, 0.9], [1, 0, 0])
    step([4, 5, 6], [0.7, 0.05, 0.9], [1, 2, 0])
    found = images.read(collector.table)
    assert [(doubted.index, doubted.suggested) for doubted in found] == [(5, 2), (1, 1)]
    assert all((doubted.image == doubted.index).all() for doubted in found)
    step([5, 6, 7], [0.8, 0.5, 0.4], [0, 0, 3])  # row 5 is believed now
    assert [doubted.index for doubted in images.read(collector.table)] == [1, 7]


# Bad input


@pytest.mark.parametrize("before", [[], ["after"]])
def test_it_stands_behind_the_callback(before, tmp_path):
    callbacks = [SAflexInsight(tmp_path), *(SAflexCallback(steering()) for _ in before)]
    with pytest.raises(
        MisconfigurationException, match=r"before `SAflexInsight`.*SAflexCallback\(\)"
    ):
        fit(Grouped(), *callbacks, train=grouped_loader())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"folder": 1}, TypeError),
        ({"max_rows": 0}, ValueError),
        ({"class_names": "cat"}, TypeError),
        ({"figures": 1}, TypeError),
    ],
)
def test_arguments_are_checked(arguments, error):
    (name,) = arguments
    with pytest.raises(error, match=f"Expected `{name}`"):
        SAflexInsight(**arguments)


def test_with_index_refuses_rows_that_are_no_pairs():
    rows = with_index([(1, 2, 3)])
    with pytest.raises(TypeError, match=r"row 0 is a tuple.*Wrap the dataset"):
        rows[0]
