"""Imports point down only: functional < engines < Lightning glue < recipes and entry points."""

import ast
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import saflex_lightning
from saflex_lightning import data

PACKAGE = Path(saflex_lightning.__file__).parent
LAYERS = {
    "functional": 0,
    "engines": 1,
    "gather": 1,
    "batch": 2,
    "bank": 2,
    "evidence": 2,
    "state": 2,
    "preflight": 2,
    "draws": 2,
    "val_stream": 2,
    "val_gradient": 2,
    "row_evidence": 2,
    "gated_rows": 2,
    "watch": 3,
    "gating": 3,
    "pool": 3,
    "gathered": 3,
    "inputs": 2,
    "plain_loss": 2,
    "val_batch": 2,
    "skips": 2,
    "strategy_calls": 2,
    "learned": 3,
    "measured": 3,
    "step": 3,
    "mixin": 4,
    "notices": 4,
    "metrics": 4,
    "settings": 4,
    "sources": 2,
    "arming": 5,
    "checks": 5,
    "matching": 5,
    "steering": 5,
    "callback": 6,
    "__init__": 7,
    "data": 3,
    "recipes": 8,
    "cli": 9,
    "configs": 10,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path):
    """Absolute names of everything a file imports."""
    package = ("saflex_lightning", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_data_needs_nothing_but_the_batch():
    for path in FILES:
        if part_of(path) == "data":
            for name in imported_modules(path):
                parts = name.split(".")
                assert parts[0] != "lightning"
                assert parts[0] != "saflex_lightning" or parts[1] in {"batch", "data"}, name


def test_recipes_use_only_the_public_api():
    public = set(saflex_lightning.__all__) | {
        f"{layer.__name__.rpartition('.')[-1]}.{name}"
        for layer in (saflex_lightning.functional, saflex_lightning.engines)
        for name in layer.__all__
    }
    # A module of `data` may be built upon in parts.
    parts = [f".{part.name}" for part in iter_modules(data.__path__)]
    for module in (import_module(f"saflex_lightning.data{part}") for part in ("", *parts)):
        place = module.__name__.removeprefix("saflex_lightning.")
        public |= {f"{place}.{name}" for name in module.__all__}
    for path in FILES:
        if part_of(path) == "recipes":
            for name in imported_modules(path):
                if name.startswith("saflex_lightning.") and ".recipes" not in name:
                    assert name.removeprefix("saflex_lightning.") in public, name
