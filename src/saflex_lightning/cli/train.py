"""What ``saflex-train`` does: one run, or a run and its rivals."""

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from saflex_lightning.cli.entry import main
from saflex_lightning.cli.quiet import silence_hints
from saflex_lightning.cli.report import RunReport, make_run_table, read_report
from saflex_lightning.cli.sweep import make_sweep_table, read_results
from saflex_lightning.cli.watch import add_insight, make_progress
from saflex_lightning.fit.checks import check_launch
from saflex_lightning.insight.write import ROWS

__all__ = ["CONFIG", "compare", "main", "train"]

CONFIG = "config.yaml"  # what was run, with every interpolation resolved
OWN_AUGMENTATION = ("no_aug", "soft_augmentation")  # methods that choose it themselves


def train(cfg: DictConfig, *, table: bool = True) -> dict[str, Any]:
    """Fit, test, print the table and write ``result.json`` into ``cfg.output_dir``.

    Beside it come ``config.yaml``, weights in ``checkpoints``, and where SAFLEX refines the tables
    of `SAflexInsight`.

    Args:
        cfg: A composition of the groups in ``saflex_lightning/configs``.
        table: Whether to print it.

    Returns:
        What ``result.json`` holds: method, seed, steps, processes, every test metric (``test/f1``
        as ``test_f1``), the validation metrics of the last epoch, fractions (None for what the
        method does not have or keeps constant) and times, and the cells of the paper's tables that
        the run stands beside.

    Raises:
        ValueError: If ``cfg.seed`` is no seed.
        FileNotFoundError: If there is nothing at ``cfg.ckpt_path``.
        MisconfigurationException: If the launcher or the GPUs do not fit the Trainer, its
            processes would not share one directory, or a metric is to select an epoch and there
            are no validation rows.
    """
    silence_hints()
    paper: Any = OmegaConf.to_container(cfg.paper, resolve=True) if cfg.paper else None
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ValueError(
            f"Expected `seed` to be an integer from 0 to {2**32 - 1}, but got {cfg.seed!r}. Every "
            "run has one; pass `seed=0`."
        )
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).exists():
        raise FileNotFoundError(
            f"Expected a checkpoint at `ckpt_path`, but there is nothing at {cfg.ckpt_path}. Pass "
            "the file `checkpoints/last.ckpt` of a run's folder."
        )
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks: list[L.Callback] = [instantiate(callback) for callback in cfg.callbacks.values()]
    callbacks.append(RunReport())
    add_insight(callbacks, cfg.output_dir)
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if cfg.trainer.get("enable_progress_bar", True) and not has_bar:
        callbacks.insert(0, make_progress())
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks)
    check_launch(trainer)
    _check_directories(trainer)
    selecting = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    ]
    if selecting:
        _check_selection(trainer, datamodule)
    directory = Path(cfg.output_dir)
    if trainer.is_global_zero:
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, directory / CONFIG, resolve=True)

    trainer.fit(model, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    report = read_report(trainer.callback_metrics)
    validated = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }
    # Where a metric selects, its best epoch is tested.
    best = selecting[0].best_model_path or None if selecting else None
    tests = trainer.test(model, datamodule=datamodule, ckpt_path=best, verbose=False)

    result = {
        "name": cfg.name,
        "seed": cfg.seed,
        "steps": report.pop("steps"),
        "processes": trainer.world_size,
        **{
            name.replace("/", "_"): value
            for metrics in (validated, *tests)
            for name, value in metrics.items()
        },
        **report,
        "paper": paper,
    }
    if trainer.is_global_zero:
        (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        if table:
            Console().print(make_run_table(result))
            _say_where(directory)
    return result


def _say_where(directory: Path) -> None:
    """Print where the results are, and how to look at them."""
    print(f"Results and weights: {directory}")
    print(f"A page of them: saflex-report {shlex.quote(str(directory))}", flush=True)


def _check_selection(trainer: L.Trainer, datamodule: Any) -> None:
    """Refuse to train for an epoch to be selected by validation rows that are not there."""
    if getattr(datamodule, "merge_val", False) or not trainer.limit_val_batches:
        raise MisconfigurationException(
            "Expected validation rows for `callbacks=best` to select an epoch by, but they are "
            "trained on, or `limit_val_batches` is 0. Pass `callbacks=last` to test the last epoch."
        )
    every = trainer.check_val_every_n_epoch or 1
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < every:
        raise MisconfigurationException(
            "Expected an epoch with validation for `callbacks=best` to select, but the first would "
            f"be number {every} of {trainer.max_epochs}. Pass `trainer.check_val_every_n_epoch=1`, "
            "or `callbacks=last` to test the last epoch."
        )


def _check_directories(trainer: L.Trainer) -> None:
    """Refuse processes that would not share the one directory of a run or a sweep."""
    if not HydraConfig.initialized() or trainer.world_size == 1:
        return
    launcher, settings = trainer.strategy.launcher, HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN and not isinstance(launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "Expected the jobs of a sweep to spawn their processes, but this one has "
            f"{trainer.world_size} that each start from the command line and would run the whole "
            "sweep again. Add `trainer.strategy=ddp_spawn`, or start one command per job."
        )
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    is_named = "SAFLEX_RUN_DIR" in os.environ or any(
        override.startswith("hydra.run.dir=") for override in settings.overrides.hydra
    )
    if isinstance(cluster, (SLURMEnvironment, TorchElasticEnvironment)) and not is_named:
        raise MisconfigurationException(
            f"Expected one run directory for {trainer.world_size} processes, but each would name "
            "its own after the clock. Set the environment variable `SAFLEX_RUN_DIR`, or pass "
            "`hydra.run.dir`."
        )


def compare(cfg: DictConfig) -> None:
    """Run the method and its rivals with the same settings and seed, and print one table.

    Args:
        cfg: As for `train`; ``cfg.rivals`` names choices of the group ``method``.
    """
    console = Console()
    home = Path(cfg.output_dir)
    given = list(HydraConfig.get().overrides.task)
    start = time.time()
    for number, rival in enumerate(cfg.rivals, 1):
        console.print(Text(f"Rival {number} of {len(cfg.rivals)}: {rival}"))
        own = [f"method={rival}", _assign("output_dir", home / "rivals" / rival)]
        kept = _without(given, "callbacks.saflex")
        if rival in OWN_AUGMENTATION:
            kept = _without(kept, "data.augmentation_settings")
        train(compose("train", overrides=[*kept, *own]), table=False)
    console.print(Text(f"SAFLEX: {cfg.name}"))
    result = train(cfg, table=False)
    results = [{**each, "overrides": []} for each in read_results(home, since=start)]  # all alike
    console.print(make_run_table(result))
    console.print(make_sweep_table(results, title=f"the same rows, seed {result['seed']}"))
    # Rows that are split or merged already have other numbers than those of the next run.
    is_whole = cfg.data.get("steering") != "split" and not cfg.data.get("merge_val")
    if (home / ROWS).is_file() and is_whole:
        print("Train again by what was learned, on the validation rows too:")
        print(shlex.join(_command_of_a_second_run(given, home)))
    _say_where(home)


def _command_of_a_second_run(given: list[str], home: Path) -> list[str]:
    """Return the command that trains on all rows by the weights of a run in ``home``.

    What the run was given stays, but for what needs validation rows or SAFLEX.
    """
    sources = HydraConfig.get().runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    not_kept = "output_dir", "callbacks", "data.steering", "trainer.limit_val_batches"
    return [
        "saflex-train",
        *(part for folder in folders for part in ("--config-dir", folder)),
        *_without(given, *not_kept),
        "method=train_plus_val",
        _assign("data.row_weights", home / ROWS),
        _assign("output_dir", home / "second"),
    ]


def _without(overrides: list[str], *names: str) -> list[str]:
    """Return the overrides but those of some settings, and of what is inside of these."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    return [
        override
        for override, key in zip(overrides, keys, strict=True)
        if not any(key == name or key.startswith(f"{name}.") for name in names)
    ]


def _assign(name: str, path: Path) -> str:
    """Return an override of Hydra, whose grammar reads some characters of a path otherwise."""
    value = str(path)
    if not re.fullmatch(r"[\w/.:@+-]+", value, re.ASCII):
        value = QuotedString(value, Quote.single).with_quotes()
    return f"{name}={value}"


if __name__ == "__main__":
    main()
