"""``saflex-train``: one run, or a sweep with ``-m``, composed by Hydra."""

import logging

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

__all__ = ["main"]


@hydra.main(version_base="1.3", config_path="pkg://saflex_lightning.configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run `train` with the configuration that Hydra composed, and its rivals beside it.

    Rivals are run where the command line chose no method, no checkpoint and not several devices.
    """
    from saflex_lightning.cli.train import compare, train  # a run needs torch, `--help` does not

    # Lightning prints its messages itself, and Hydra's handler would again.
    logging.getLogger("lightning").propagate = False
    settings = HydraConfig.get()
    chosen = any(
        item.startswith(("method=", "debug=", "ckpt_path=")) for item in settings.overrides.task
    )
    alone = settings.mode == RunMode.MULTIRUN or cfg.trainer.get("devices", 1) != 1
    if cfg.rivals and not chosen and not alone:
        compare(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
