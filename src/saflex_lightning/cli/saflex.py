"""``saflex fit|validate|test``: the experiments, or your own classes, by LightningCLI."""

import os
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

from saflex_lightning.cli.quiet import silence_hints
from saflex_lightning.cli.watch import add_insight
from saflex_lightning.fit.checks import check_launch

__all__ = ["compose_experiment", "find_config", "main"]

MAIN = "main"
OPTIONS = ("--config", "-c")


def find_config(value: str) -> str:
    """Return what LightningCLI's ``--config`` takes for what the command line says.

    Args:
        value: A path; or the name of an experiment of ``saflex-train`` or of its main job,
            ``main``, and behind it Hydra overrides, as in ``"tabular_mlp method=uniform"``; or the
            name of a file that ships with the package, ``medmnist_4gpu_fp16``.

    Returns:
        A path or the content of a file; ``value`` itself where nothing is found: the parser then
        reports it.
    """
    # Content, which a launcher repeats, or a file; `Path.is_file` raises where it is too long.
    if "\n" in value or os.path.isfile(value):
        return value
    configs = Path(str(resources.files("saflex_lightning") / "configs"))
    try:
        name, *overrides = shlex.split(value)
    except ValueError:  # nothing, or a quotation mark alone
        return value
    if name == MAIN or (configs / "experiment" / f"{name}.yaml").is_file():
        return yaml.safe_dump(compose_experiment(name, *overrides), sort_keys=False)
    shipped = configs / "lightning_cli" / f"{Path(name).stem}.yaml"
    return str(shipped) if shipped.is_file() else value


def compose_experiment(name: str, *overrides: str) -> dict[str, Any]:
    """Return a job of ``saflex-train`` as LightningCLI writes it, with class paths.

    It differs in one thing: every run has a folder of its own, ``outputs/NAME/version_N``, where
    the weights are too.

    Args:
        name: An experiment, or ``main``.
        *overrides: Hydra overrides, such as ``method=uniform``.
    """
    chosen = [] if name == MAIN else [f"experiment={name}"]
    own = [f"output_dir=outputs/{name}", "trainer.enable_checkpointing=true"]
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        cfg = compose("train", [*chosen, *own, *overrides])
    job: Any = OmegaConf.to_container(cfg, resolve=True)
    trainer = job["trainer"]
    if trainer.get("limit_val_batches") != 0 and trainer.get("check_val_every_n_epoch", 1) == 1:
        # Lightning keeps the last epoch itself, and `--trainer.enable_checkpointing=false` is free.
        job["callbacks"].pop("last", None)
    for callback in job["callbacks"].values():
        if callback.get("dirpath") == f"{job['output_dir']}/checkpoints":
            del callback["dirpath"]  # that of the logger takes its place
    logger = trainer["logger"]
    if logger:
        logger |= {"name": "", "version": None}
    return {
        "seed_everything": job["seed"],
        "trainer": {
            **_with_class_paths(job["trainer"])["init_args"],
            "callbacks": [_with_class_paths(entry) for entry in job["callbacks"].values()],
        },
        "model": _with_class_paths(job["model"]),
        "data": _with_class_paths(job["data"]),
    }


def _with_class_paths(value: Any) -> Any:
    """Write ``_target_`` as LightningCLI does."""
    if isinstance(value, list):
        return [_with_class_paths(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    args = {name: _with_class_paths(entry) for name, entry in value.items() if name != "_target_"}
    return {"class_path": value["_target_"], "init_args": args} if "_target_" in value else args


class CheckedCLI(LightningCLI):
    """LightningCLI that refuses a Trainer its launcher or its GPUs cannot serve.

    `SAflexInsight` writes what `SAflexCallback` has learned into the folder of the logger.
    """

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Compare the Trainer with its launcher and GPUs before it starts."""
        trainer = super().instantiate_trainer(**kwargs)
        check_launch(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves no files
            add_insight(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer


def main() -> None:
    """Run LightningCLI on the process's arguments; model and data are given by class path."""
    silence_hints()
    # LightningCLI reads the process's arguments itself, and warns when it is given others.
    sys.argv[1:] = _find_configs(sys.argv[1:])
    CheckedCLI(
        # The model chooses its optimizer, and a second run may follow in the same directory.
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )


def _find_configs(args: list[str]) -> list[str]:
    found = []
    for before, argument in zip([None, *args], args, strict=False):
        option, equals, value = argument.partition("=")
        if before in OPTIONS:
            argument = find_config(argument)
        elif option in OPTIONS and equals:
            argument = f"{option}={find_config(value)}"
        found.append(argument)
    return found


if __name__ == "__main__":
    main()
