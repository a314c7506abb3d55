"""Every notebook runs on small settings, and its two files hold the same cells."""

import re
from base64 import b64decode
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest
from helpers.standins import write_medmnist

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
README = (NOTEBOOKS.parent / "README.md").read_text()
FIRST = "medmnist_quickstart"  # the one whose outputs are kept
NAMES = sorted({file.stem for file in NOTEBOOKS.iterdir() if file.suffix in {".py", ".ipynb"}})

# What replaces the values of the cell tagged "parameters", one entry per notebook.
SMALL = {
    "medmnist_quickstart": {
        "overrides": [
            "trainer.max_epochs=1",
            "data.batch_size=128",
            "trainer.enable_progress_bar=false",
        ],
        "methods": ["upstream", "saflex_robust"],
        "folder": Path("outputs"),
    },
    "tabular": {"max_epochs": 1, "batch_size": 64},
    "toy_2d": {
        "steps": 6,
        "shown_steps": (1, 5),
    },
    "purify_generated_pool": {
        "file": "bloodmnist.npz",
        "vae_epochs": 1,
        "strengths": [0.6],
        "max_epochs": 1,
        "batch_size": 16,
    },
}


def test_every_notebook_has_small_settings():
    assert sorted(SMALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_files_hold_the_same_cells(name):
    script, notebook = (jupytext.read(NOTEBOOKS / f"{name}{end}") for end in (".py", ".ipynb"))
    cells = [
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in file.cells]
        for file in (script, notebook)
    ]
    assert cells[0] == cells[1], f"run `jupytext --sync notebooks/{name}.py`"
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"


@pytest.mark.parametrize("name", [name for name in NAMES if name != FIRST])
def test_outputs_are_stripped(name):
    for cell in jupytext.read(NOTEBOOKS / f"{name}.ipynb").cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_first_notebook_shows_one_whole_run():
    cells = [c for c in jupytext.read(NOTEBOOKS / f"{FIRST}.ipynb").cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    figures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(figures) == 5
    assert b64decode(figures[2]) == (NOTEBOOKS.parent / "docs/images/belief.png").read_bytes()
    streams = [output for output in outputs if output.output_type == "stream"]
    assert {output.name for output in streams} == {"stdout"}
    # The numbers that the README prints are those of this run.
    row = re.compile(r"^(no_aug|upstream|label_smoothing|saflex_robust) +([\d.]+)", re.MULTILINE)
    shown = dict(row.findall("".join(output.text for output in streams)))
    printed = dict(row.findall(README))
    assert {name: float(number) for name, number in printed.items()} == {
        name: float(number) for name, number in shown.items()
    }


SLOW = {"purify_generated_pool", "tabular"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES]
)
def test_runs_on_small_settings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_medmnist(tmp_path, "blood")
    plt.switch_backend("agg")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    namespace = {"__name__": "__main__"}
    cells = jupytext.read(NOTEBOOKS / f"{name}.py").cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    for number, cell in enumerate(cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}, cell {number}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            assert SMALL[name].keys() <= namespace.keys()
            namespace |= SMALL[name]
    plt.close("all")
