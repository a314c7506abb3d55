"""``saflex-train``: one run, or a sweep with ``-m``, composed by Hydra."""

import json
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from saflex_lightning.recipes.paper import check_paper
from saflex_lightning.recipes.quiet import silence_hints
from saflex_lightning.recipes.report import RunReport, make_run_table

__all__ = ["main", "train"]


def train(cfg: DictConfig) -> dict[str, Any]:
    """Fit, test, print the table and write ``result.json`` into ``cfg.output_dir``.

    Args:
        cfg: A composition of the groups in ``saflex_lightning/configs``.

    Returns:
        What ``result.json`` holds: method, seed, steps, every test metric (``test/f1`` as
        ``test_f1``), fractions and times (None for what the method does not have), and the cells
        of the paper's tables that the run stands beside.
    """
    silence_hints()
    paper: Any = OmegaConf.to_container(cfg.paper, resolve=True) if cfg.paper else None
    check_paper(paper)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    model = instantiate(cfg.model)
    report = RunReport()
    callbacks = [*(instantiate(callback) for callback in cfg.callbacks.values()), report]
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks)

    trainer.fit(model, datamodule=datamodule)
    steps = trainer.global_step
    # Where a metric selects, its best epoch is tested.
    selects = isinstance(trainer.checkpoint_callback, ModelCheckpoint) and (
        trainer.checkpoint_callback.monitor is not None
    )
    ckpt_path = "best" if selects else None
    tests = trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)

    result = {
        "name": cfg.name,
        "seed": cfg.seed,
        "steps": steps,
        **{name.replace("/", "_"): value for metrics in tests for name, value in metrics.items()},
        **report.summarize(),
        "paper": paper,
    }
    if trainer.is_global_zero:
        directory = Path(cfg.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        Console().print(make_run_table(result))
    return result


@hydra.main(version_base="1.3", config_path="pkg://saflex_lightning.configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run `train` with the configuration that Hydra composed."""
    train(cfg)


if __name__ == "__main__":
    main()
