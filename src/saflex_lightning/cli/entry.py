"""``saflex-train``: one run, or a sweep with ``-m``, composed by Hydra."""

import logging

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

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
    is_sweep = settings.mode == RunMode.MULTIRUN
    if is_sweep and not OmegaConf.is_interpolation(cfg, "output_dir"):
        raise ValueError(
            "Expected each job of a sweep to have a folder of its own, but got "
            f"output_dir={cfg.output_dir} for all. Pass `hydra.sweep.dir=FOLDER`; the jobs write "
            "into 0, 1, ... of that."
        )
    chosen = any(
        item.startswith(("method=", "debug=", "ckpt_path=")) for item in settings.overrides.task
    )
    alone = is_sweep or cfg.trainer.get("devices", 1) != 1
    if cfg.rivals and not chosen and not alone:
        compare(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
