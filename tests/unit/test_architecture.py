"""What the tree promises: imports point down, few public names, few files in a step."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saflex_lightning

PACKAGE = Path(saflex_lightning.__file__).parent
TRACE = Path(__file__).parents[2] / "benchmarks" / "trace_step.py"
LAYERS = {
    "functional": 0,
    "engines": 1,
    "batch": 2,
    "validation": 3,
    "evidence": 3,
    "step": 4,
    "module": 5,
    "adopt": 5,
    "fit": 6,
    "callback": 7,
    "insight": 8,
    "__init__": 8,
    "data": 3,
    "recipes": 9,
    "audit": 10,
    "cli": 11,
    "configs": 11,
}
PUBLIC = {
    "saflex_lightning": {
        "AugmentedBatch",
        "SAflexCallback",
        "SAflexInsight",
        "SAflexMixin",
        "SAflexSolution",
        "SAflexWarning",
        "UnsupportedModelError",
        "gather_rows",
    },
    "saflex_lightning.functional": {
        "Settings",
        "contrastive_scores",
        "make_settings",
        "same_class_target",
        "solve",
        "weighted_cross_entropy",
    },
    "saflex_lightning.engines": {"UnsupportedModelError", "descent_direction", "make_engine"},
    "saflex_lightning.data": {
        "ResumableLoader",
        "TagOperations",
        "UnionDataset",
        "group_names_of",
        "read_row_weights",
        "union_batch",
        "union_loader",
        "with_index",
    },
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path, *, types=False):
    """Absolute names of everything a file imports; of ``TYPE_CHECKING`` blocks if asked for."""
    package = ("saflex_lightning", *path.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_upward(path):
    own = LAYERS[part_of(path)]
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "saflex_lightning":
            other = parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"
            assert LAYERS[other] <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in {"functional", "engines"}])
def test_functional_and_engines_need_neither_lightning_nor_torchvision(path):
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert not tops & {"lightning", "pytorch_lightning", "torchvision", "hydra", "jsonargparse"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_few_and_documented(name):
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    for public in module.__all__:
        assert getattr(module, public).__doc__, public
    assert len(set().union(*PUBLIC.values())) <= 24


def test_data_needs_nothing_but_the_batch():
    for path in FILES:
        if part_of(path) == "data":
            for name in imported_modules(path):
                parts = name.split(".")
                assert parts[0] != "lightning"
                assert parts[0] != "saflex_lightning" or parts[1] in {"batch", "data"}, name


def test_recipes_use_only_the_public_api():
    public = {f"{name}.{entry}" for name, names in PUBLIC.items() for entry in names}
    own = ("saflex_lightning.recipes", "saflex_lightning.data")
    for path in FILES:
        if part_of(path) == "recipes":
            for name in imported_modules(path):
                if name.startswith("saflex_lightning.") and not name.startswith(own):
                    assert name in public, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("settings", "files", "changes"),
    [
        ({}, 16, 100),
        pytest.param({"preset": "gradient", "engine": "head"}, 14, 104, marks=pytest.mark.slow),
        pytest.param(
            {"preset": "gradient", "row_evidence": True},
            19,
            142,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_is_read_in_few_files(settings, files, changes):
    command = [sys.executable, "-W", "ignore", str(TRACE), json.dumps(settings)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.fullmatch(r"(\d+) files, (\d+) changes", printed.strip().splitlines()[-1])
    assert int(found[1]) <= files
    assert int(found[2]) <= changes
