"""The CLIP experiments: their rivals stand in the same table."""

import pytest
from helpers.benchmarks import load_benchmark
from helpers.configs import compose_config, render
from helpers.standins import clip_experiment

from saflex_lightning.cli.sweep import read_results
from saflex_lightning.cli.train import train

paper = load_benchmark("paper")
make_paper_tables, paper_cell = paper.make_paper_tables, paper.paper_cell


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
