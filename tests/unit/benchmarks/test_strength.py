"""Curves over augmentation strength: points by hand, and the picture of a sweep's folder."""

import json

import pytest
from helpers.benchmarks import load_benchmark

strength = load_benchmark("strength")
SETTING, Point = strength.SETTING, strength.Point
collect_curves, main = strength.collect_curves, strength.main


def result(name, magnitude, accuracy, *others):
    return {
        "name": name,
        "test_accuracy": accuracy,
        "overrides": [*others, f"{SETTING}={magnitude}"],
    }


def test_points_are_means_over_seeds_in_increasing_strength():
    results = [
        result("upstream", 20, 0.5),
        result("upstream", 5, 0.80),
        result("saflex_robust", 5, 0.9),
        result("upstream", 5, 0.84),
    ]
    curves = collect_curves(results)
    assert list(curves) == ["upstream", "saflex_robust"]
    (weak, strong), (single,) = curves.values()
    assert weak == pytest.approx(Point(5.0, 82.0, 2.8284271, 2))
    assert strong == Point(20.0, 50.0, 0.0, 1)
    assert single == Point(5.0, 90.0, 0.0, 1)


@pytest.mark.parametrize(
    "results",
    [
        [{"name": "upstream", "test_accuracy": 0.5, "overrides": []}],
        [result("upstream", 5, 0.5), result("upstream", 5, 0.5, "model.lr=0.1")],
    ],
)
def test_other_sweeps_are_refused(results):
    with pytest.raises(ValueError, match="results of one sweep over `data"):
        collect_curves(results)


def test_picture_of_a_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for number, (magnitude, accuracy) in enumerate([(0, 0.8), (10, 0.7)]):
        job = tmp_path / str(number)
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_text(
            json.dumps(["method=upstream", "seed=1", f"{SETTING}={magnitude}"])
        )
        content = {"name": "upstream", "seed": 1, "test_accuracy": accuracy}
        (job / "result.json").write_text(json.dumps(content))
    main([str(tmp_path)])
    assert "upstream  10  70.00 ± 0.00 (1)" in capsys.readouterr().out
    assert (tmp_path / "strength.png").read_bytes().startswith(b"\x89PNG")


def test_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no result.json below" in capsys.readouterr().err
