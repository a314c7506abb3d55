"""The accuracy benchmark: its arithmetic, its tables, and one real run that is not repeated."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmarks import BENCHMARKS, load_benchmark
from helpers.configs import compose_config

from saflex_lightning.recipes.medmnist import read_medmnist


@pytest.fixture(scope="module")
def accuracy():
    return load_benchmark("accuracy")


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


def make_bench(*overrides, role="selection"):
    return sys.modules["registry"].Bench(overrides, "test_accuracy", role, 1.0)


def test_tables_keep_selection_and_confirmation_apart_and_name_what_is_missing(
    accuracy, monkeypatch
):
    bench, other = make_bench(), make_bench(role="confirmation")
    monkeypatch.setattr(accuracy, "BENCHES", {"chosen": bench, "first": other, "second": other})
    scores = {
        "chosen": {"robust": {1: result(0.9)}, "upstream": {1: result(0.1)}},
        "first": {
            "robust": {1: result(0.82)},
            "upstream": {1: result(0.80)},
            "no_aug": {1: result(0.83)},
        },
        "second": {"robust": {1: result(0.84)}, "upstream": {1: result(0.80)}},
    }
    tables = accuracy.format_tables(scores)
    assert "| first | confirmation | test_accuracy | robust | 82.00 (1) | +2.00 (1) |" in tables
    assert "| second | confirmation | test_accuracy | no_aug | not measured | |" in tables
    selection, confirmation = tables.split("Over confirmation benches:")
    assert "| robust | upstream | +80.00 (1) | chosen +80.00 (1) | none |" in selection
    # Two benches, +2 and +4: t with 1 degree of freedom is 12.706, the standard error 1.
    assert "| robust | upstream | +3.00 ± 12.71 (2) | first +2.00 (1) | none |" in confirmation
    assert "| robust | no_aug | -1.00 (1) | first -1.00 (1) | none |" in confirmation
    assert "| robust | paper | not measured | | |" in confirmation


def test_a_bench_is_below_where_the_mean_is_by_more_than_its_standard_error(accuracy):
    assert not accuracy.Difference.of([-3.0, 1.0]).is_below()  # -1 ± 2
    assert accuracy.Difference.of([-3.0, -1.0]).is_below()  # -2 ± 1
    assert not accuracy.Difference.of([-3.0]).is_below()  # one pair cannot tell


def test_saved_results_are_one_line_per_method_of_a_bench(accuracy):
    run = {"name": "robust", "test_accuracy": 0.8123456, "val_auroc": None, "steps": 3, "paper": {}}
    text = accuracy.format_json({"first": {"robust": {1: run}, "upstream": {2: run}}})
    seeds = {"1": {"test_accuracy": 0.81235, "steps": 3}}
    assert json.loads(text)[0] == {"bench": "first", "method": "robust", "seeds": seeds}
    assert len(text.splitlines()) == 4


def test_saved_results_are_added_to_and_not_computed_again(accuracy, monkeypatch, tmp_path):
    """As on another machine: the folder of the first runs is not there."""
    bench, other = make_bench(), make_bench()
    monkeypatch.setattr(accuracy, "BENCHES", {"first": bench, "second": other})
    ran, saved = [], tmp_path / "saved"

    def run(job):
        job.folder.mkdir(parents=True)
        (job.folder / "result.json").write_text(json.dumps(result(job.seed / 10)))
        ran.append((job.bench, job.method, job.seed))
        return True

    def sweep(root, *arguments):
        command = ["accuracy.py", "run", "--methods", "robust", "--save", str(saved), *arguments]
        monkeypatch.setattr(sys, "argv", [*command, "--root", str(tmp_path / root)])
        ran.clear()
        with pytest.raises(SystemExit) as end:
            accuracy.main()
        assert end.value.code == 0
        return list(ran)

    monkeypatch.setattr(accuracy.Job, "run", run)
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", ThreadPoolExecutor)
    assert sweep("a", "--benches", "second", "--seeds", "1") == [("second", "robust", 1)]
    assert sweep("b", "--seeds", "1", "2") == [
        ("first", "robust", 1),
        ("first", "robust", 2),
        ("second", "robust", 2),
    ]
    known = accuracy.read_saved(saved.with_suffix(".json"))
    assert known == {name: {"robust": {1: result(0.1), 2: result(0.2)}} for name in known}
    assert list(known) == ["first", "second"]  # the registry's order
    assert "| second | selection | test_accuracy | robust | 15.00 ± 7.07 (2) |" in (
        saved.with_suffix(".md").read_text()
    )
    # Runs of the other tier add to what is saved of this one, and take nothing away.
    at_scale = dataclasses.replace(bench, tier="gpu")
    monkeypatch.setattr(accuracy, "BENCHES", {"first": at_scale, "second": other})
    assert sweep("c", "--benches", "first", "--seeds", "3") == [("first", "robust", 3)]
    assert accuracy.read_saved(saved.with_suffix(".json"))["second"] == known["second"]


def all_jobs(accuracy, folder):
    return [
        (accuracy.Job(name, method, 1, folder, folder), bench)
        for name, bench in accuracy.BENCHES.items()
        for method, settings in accuracy.METHODS.items()
        if settings.serves(bench)
    ]


@pytest.mark.parametrize(
    ("bench", "method"),
    [
        ("blood_few_mixup", "robust, nothing held out"),
        ("qsar_mlp", "robust, looks every step"),
        ("qsar_saint", "paper, replaced"),
        ("blood_pool_noise_40", "oracle filter"),
        ("bloodmnist_randaugment", "paper, probs, beta 1"),
    ],
)
def test_a_method_composes_on_a_bench(accuracy, tmp_path, bench, method):
    job = accuracy.Job(bench, method, 1, tmp_path, tmp_path)
    assert compose_config(tmp_path, *job.overrides()).seed == 1


@pytest.mark.slow
def test_every_method_composes_on_every_bench_that_it_serves(accuracy, tmp_path):
    jobs = all_jobs(accuracy, tmp_path)
    assert {job.bench for job, _ in jobs} == set(accuracy.BENCHES)
    assert {job.method for job, _ in jobs} == set(accuracy.METHODS)
    # Every method once on each kind of bench, and every bench once.
    chosen = {(job.method, bench.kind): job for job, bench in jobs}
    chosen |= {job.bench: job for job, _ in jobs if job.method == "robust"}
    for job in chosen.values():
        assert compose_config(tmp_path, *job.overrides()).seed == 1


def test_what_a_bench_lacks_is_named_with_the_way_to_get_it(accuracy, tmp_path):
    job = accuracy.Job("fashion_few_crop", "robust", 3, tmp_path, tmp_path)
    message = job.missing()
    assert message.startswith(f"fashion_few_crop needs {tmp_path}/few_shot/fashion_3.npz: python")
    assert f"{tmp_path}/few_shot/fashion --seeds 3" in message
    Path(job.fill(accuracy.BENCHES[job.bench].needs)).parent.mkdir()
    Path(job.fill(accuracy.BENCHES[job.bench].needs)).touch()
    assert job.missing() is None


def test_few_images_of_each_class_are_drawn_from_the_split_of_their_name(tmp_path):
    rng = np.random.default_rng(0)
    source = {}
    for split, first in (("train", 0), ("val", 100), ("test", 200)):
        source[f"{split}_labels"] = rng.permutation(np.repeat(np.arange(3), 20))[:, None]
        pixels = first + np.arange(60, dtype=np.uint8)
        source[f"{split}_images"] = np.broadcast_to(pixels[:, None, None, None], (60, 28, 28, 3))
    np.savez(tmp_path / "source.npz", **source)
    command = [sys.executable, str(BENCHMARKS / "make_few_shot.py"), str(tmp_path / "source.npz")]
    sizes = ["--train", "5", "--val", "2", "--test", "4", "--seeds", "1", "2"]
    subprocess.run([*command, str(tmp_path / "few"), *sizes], check=True, capture_output=True)
    drawn = []
    for seed in (1, 2):
        splits = read_medmnist(tmp_path / f"few_{seed}.npz", num_classes=3)
        for name, per_class in (("train", 5), ("val", 2), ("test", 4)):
            images, target = splits[name]
            assert target.bincount().tolist() == [per_class] * 3
            first = {"train": 0, "val": 100, "test": 200}[name]
            rows = images[:, 0, 0, 0].long() - first  # a pixel says which row it is
            assert len(rows.unique()) == len(rows)
            assert (source[f"{name}_labels"].ravel()[rows] == target.numpy()).all()
            drawn.append(rows.tolist())
    assert drawn[0] != drawn[3]  # training rows of another seed
    assert drawn[2] == drawn[5]  # the same test rows


def test_a_finished_run_is_not_repeated(accuracy, monkeypatch, tmp_path):
    overrides = (
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=1",
        "model.schedule=constant",
    )
    overrides += ("+trainer.limit_test_batches=1", "+trainer.limit_val_batches=1")
    monkeypatch.setattr(accuracy, "BENCHES", {"tiny": make_bench(*overrides)})
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
    monkeypatch.setattr(accuracy, "BENCHES", {"broken": make_bench("no_such_key=1")})
    job = accuracy.Job("broken", "upstream", 1, tmp_path)
    assert not job.run()
    assert job.result() is None
    assert "failed: broken / upstream / seed 1" in capsys.readouterr().out
    assert "no_such_key" in next(tmp_path.rglob("log.txt")).read_text()
