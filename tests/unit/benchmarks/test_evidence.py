"""The control says nothing of a row: planted wrong labels are told by the default alone."""

from dataclasses import replace

import pytest
from helpers.benchmarks import load_benchmark

evidence = load_benchmark("evidence")
NAME = "digits symmetric"


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setitem(evidence.BENCHES, NAME, replace(evidence.BENCHES[NAME], steps=120))


@pytest.mark.usefixtures("_short")
def test_the_default_tells_wrong_labels_and_its_control_does_not(tmp_path):
    found = {method: evidence.run(NAME, method, 1, tmp_path) for method in ("robust", "shuffled")}
    assert found["robust"]["auroc"] > 0.9
    assert abs(found["shuffled"]["auroc"] - 0.5) < 0.1
    assert found["robust"]["accuracy"] > found["shuffled"]["accuracy"]


def test_tables_of_saved_results_are_those_of_the_runs(tmp_path, monkeypatch):
    runs = {
        (NAME, method, seed): {"accuracy": accuracy + seed, "loss": 0.5}
        for method, accuracy in (("union", 70.0), ("robust", 80.0))
        for seed in (1, 2)
    }
    (tmp_path / "saved.json").write_text(evidence.as_lines(runs))
    monkeypatch.setattr(evidence, "OUTPUTS", tmp_path)
    text = "\n".join(evidence.tables(evidence.load(tmp_path / "saved.json")))
    assert text == "\n".join(evidence.tables(runs))
    assert "| digits symmetric | +10.0 ± 0.0 |" in text
