"""The accuracy benchmark: its arithmetic, its tables, and one real run that is not repeated."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def result(test, val=0.5):
    return {"test_accuracy": test, "val_accuracy": val}


def test_interval_of_paired_differences(accuracy):
    difference = accuracy.Difference.of([1.0, 2.0, 3.0])
    # Student's t with 2 degrees of freedom: 4.3027; standard error 1 / sqrt(3).
    assert (difference.mean, difference.pairs) == (2.0, 3)
    assert difference.half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert str(difference) == "+2.00 ± 2.48 (3)"
    assert str(accuracy.Difference.of([-0.5])) == "-0.50 (1)"


def test_only_seeds_of_both_methods_are_compared(accuracy):
    first, second = {1: 80.0, 2: 82.0, 3: 99.0}, {1: 79.0, 2: 79.0, 4: 0.0}
    assert accuracy.compare(first, second).mean == 2.0
    assert accuracy.compare(first, {4: 0.0}) is None


def test_rival_is_chosen_on_validation_rows_even_where_it_tests_worse(accuracy):
    methods = {
        "no_aug": {1: result(0.90, val=0.7), 2: result(0.80, val=0.9)},
        "upstream": {1: result(0.60, val=0.8), 2: result(0.95, val=0.5)},
    }
    assert accuracy.chosen_by_validation(methods, "test_accuracy") == {1: 60.0, 2: 80.0}


def test_tables_keep_selection_and_confirmation_apart_and_name_what_is_missing(
    accuracy, monkeypatch
):
    bench = accuracy.Bench((), "test_accuracy", "selection", "cpu", 1.0)
    other = accuracy.Bench((), "test_accuracy", "confirmation", "cpu", 1.0)
    monkeypatch.setattr(accuracy, "BENCHES", {"chosen": bench, "first": other, "second": other})
    scores = {
        "chosen": {"robust": {1: result(0.9)}, "upstream": {1: result(0.1)}},
        "first": {"robust": {1: result(0.82)}, "upstream": {1: result(0.80)}},
        "second": {"robust": {1: result(0.84)}, "upstream": {1: result(0.80)}},
    }
    tables = accuracy.format_tables(scores)
    assert "| first | confirmation | test_accuracy | robust | 82.00 (1) | +2.00 (1) |" in tables
    assert "| first | confirmation | test_accuracy | no_aug | not measured | |" in tables
    # Two benches, +2 and +4: t with 1 degree of freedom is 12.706, the standard error 1.
    assert "| **mean over confirmation benches** | +3.00 ± 12.71 (2) |" in tables
    assert "| **mean over selection benches** | +80.00 (1) |" in tables


def test_every_choice_named_in_the_registry_exists(accuracy):
    configs = Path(FILE).parents[1] / "src/saflex_lightning/configs"
    overrides = [*(b.overrides for b in accuracy.BENCHES.values()), *accuracy.METHODS.values()]
    chosen = [item.split("=") for items in overrides for item in items]
    groups = [(group, name) for group, name in chosen if (configs / group).is_dir()]
    assert {group for group, _ in groups} >= {"method", "augmentation"}
    for group, name in groups:
        assert (configs / group / f"{name}.yaml").is_file(), f"{group}={name}"


def test_a_finished_run_is_not_repeated(accuracy, monkeypatch, tmp_path):
    overrides = (
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=1",
        "model.schedule=constant",
    )
    overrides += ("+trainer.limit_test_batches=1", "+trainer.limit_val_batches=1")
    bench = accuracy.Bench(overrides, "test_accuracy", "selection", "cpu", 1.0)
    monkeypatch.setattr(accuracy, "BENCHES", {"tiny": bench})
    job = accuracy.Job("tiny", "upstream", 1, tmp_path)
    assert job.result() is None
    assert job.run()
    assert job.result()["name"] == "upstream"
    marked = job.folder / "result.json"
    marked.write_text(json.dumps({**job.result(), "marked": True}))
    assert job.run()
    assert job.result()["marked"]
    scores = accuracy.read_scores(tmp_path)
    assert 0 <= scores["tiny"]["upstream"][1]["test_accuracy"] <= 1
    assert 0 <= scores["tiny"]["upstream"][1]["val_accuracy"] <= 1


def test_a_failed_run_leaves_its_log_and_no_result(accuracy, monkeypatch, tmp_path, capsys):
    bench = accuracy.Bench(("no_such_key=1",), "test_accuracy", "selection", "cpu", 1.0)
    monkeypatch.setattr(accuracy, "BENCHES", {"broken": bench})
    job = accuracy.Job("broken", "upstream", 1, tmp_path)
    assert not job.run()
    assert job.result() is None
    assert "failed: broken / upstream / seed 1" in capsys.readouterr().out
    assert "no_such_key" in next(tmp_path.rglob("log.txt")).read_text()
