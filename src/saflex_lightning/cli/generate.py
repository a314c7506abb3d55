"""``saflex-generate``: class folders of real images, and pools of generated ones."""

from typing import Any

import jsonargparse

from saflex_lightning.recipes.diffusion import fill_pool_by_diffusion
from saflex_lightning.recipes.medmnist_folders import write_medmnist_folders
from saflex_lightning.recipes.vae import fill_pool_by_vae

__all__ = ["main"]

COMMANDS: dict[str, Any] = {
    "diffusion": fill_pool_by_diffusion,
    "vae": fill_pool_by_vae,
    "medmnist": write_medmnist_folders,
}


def main() -> None:
    """Run the command that the process's arguments name; ``--help`` lists all of them."""
    jsonargparse.auto_cli(COMMANDS, as_positional=False)


if __name__ == "__main__":
    main()
