"""``saflex fit|validate|test``: the recipes, or your own classes, by LightningCLI."""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from saflex_lightning.fit.checks import check_launch
from saflex_lightning.recipes.quiet import silence_hints

__all__ = ["find_config", "main"]


def find_config(name: str) -> str:
    """Return the path of a config file: a file that exists, else one that ships with the package.

    Args:
        name: A path; ``configs/lightning_cli/blood_randaugment.yaml`` and
            ``lightning_cli/blood_randaugment.yaml`` name the shipped file from any directory.

    Returns:
        The shipped file's path, or ``name`` itself when there is none: the parser then reports it.
    """
    shipped = Path(str(resources.files("saflex_lightning") / "configs"))
    packaged = shipped / Path(name).as_posix().removeprefix("./").removeprefix("configs/")
    return name if Path(name).is_file() or not packaged.is_file() else str(packaged)


class CheckedCLI(LightningCLI):
    """LightningCLI that refuses a Trainer its launcher or its GPUs cannot serve."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Compare the Trainer with its launcher and GPUs before it starts."""
        trainer = super().instantiate_trainer(**kwargs)
        check_launch(trainer)
        return trainer


def main() -> None:
    """Run LightningCLI on the process's arguments; model and data are given by class path."""
    silence_hints()
    # LightningCLI reads the process's arguments itself, and warns when it is given others.
    sys.argv[1:] = _resolve_configs(sys.argv[1:])
    CheckedCLI(
        # The model chooses its optimizer, and a second run may follow in the same directory.
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )


def _resolve_configs(args: list[str]) -> list[str]:
    resolved = []
    for before, argument in zip([None, *args], args, strict=False):
        option, equals, value = argument.partition("=")
        if before in {"--config", "-c"}:
            argument = find_config(argument)
        elif option in {"--config", "-c"} and equals:
            argument = f"{option}={find_config(value)}"
        resolved.append(argument)
    return resolved


if __name__ == "__main__":
    main()
