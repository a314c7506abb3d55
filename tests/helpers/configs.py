"""Composition of the shipped configs, and tables as text."""

import csv
from importlib import resources
from io import StringIO
from pathlib import Path

from hydra import compose, initialize_config_module
from rich.console import Console

CONFIGS = Path(str(resources.files("saflex_lightning.configs")))


def compose_config(output_dir, *overrides):
    """Compose a job; one without an experiment is that of the groups' own defaults."""
    if not any(item.startswith("experiment=") for item in overrides):
        overrides = ("~experiment", *overrides)
    with initialize_config_module(config_module="saflex_lightning.configs", version_base="1.3"):
        return compose("train", overrides=[*overrides, f"output_dir={output_dir}"])


def groups_in_log(output_dir):
    """Names of the groups whose mean weight was logged, in the order of the log."""
    with (Path(output_dir) / "csv" / "metrics.csv").open(newline="") as stream:
        columns = csv.DictReader(stream).fieldnames
    return [name.removeprefix("saflex/weight/") for name in columns if "saflex/weight/" in name]


def render(table, width=160):
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()
