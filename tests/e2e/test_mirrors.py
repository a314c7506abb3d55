"""Every LightningCLI file says, leaf by leaf, what the Hydra job that it mirrors instantiates."""

import pytest
import yaml
from helpers.configs import CONFIGS, compose_config
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf import OmegaConf

FILES = sorted(file.stem for file in (CONFIGS / "lightning_cli").glob("*.yaml"))
# What a file mirrors, where that is not the experiment of its name.
JOBS = {
    "blood_randaugment": [],
    "medmnist_4gpu_fp16": [
        *("experiment=medmnist_randaugment", "trainer=ddp_4gpu", "data.batch_size=32"),
        *("data.steering=split", "data.num_workers=4"),
    ],
}
# Where files written by hand may differ: two commands, fit and test, need a checkpoint between
# them, and LightningCLI counts its runs in a folder of the logger.
OWN_FOLDERS = {
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    *(f"trainer.logger.init_args.{name}" for name in ("save_dir", "name", "version")),
}
DIFFERENT = {
    **dict.fromkeys(
        ("blood_randaugment", "clip_flyp", "tabular_mlp", "tabular_saint"), OWN_FOLDERS
    ),
    # A requeued job resumes from the last epoch.
    "medmnist_4gpu_fp16": OWN_FOLDERS | {"trainer.callbacks.0.init_args.save_last"},
}


def as_class_path(value):
    """Write ``_target_`` as LightningCLI does."""
    if isinstance(value, list):
        return [as_class_path(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    args = {name: as_class_path(entry) for name, entry in value.items() if name != "_target_"}
    return {"class_path": value["_target_"], "init_args": args} if "_target_" in value else args


@pytest.fixture(scope="module")
def parser():
    """What LightningCLI parses a file by: it checks every key and fills in the defaults."""
    made = LightningArgumentParser(exit_on_error=False)
    made.add_argument("--seed_everything", type=int)
    made.add_lightning_class_args(Trainer, "trainer")
    made.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    made.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return made


def leaves(value, place=()):
    """Flatten what a parser returns: place to value."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and value:
        entries = enumerate(value)
    else:
        return {".".join(map(str, place)): value}
    return {
        key: leaf for name, entry in entries for key, leaf in leaves(entry, (*place, name)).items()
    }


def parse(parser, config):
    return leaves(parser.parse_object(config).as_dict())


def parse_job(parser, name, overrides):
    cfg = compose_config(f"outputs/{name}", *overrides)
    job = OmegaConf.to_container(cfg, resolve=True)
    parts = {part: as_class_path(job[part]) for part in ("trainer", "model", "data")}
    trainer = parts["trainer"]["init_args"]
    trainer["callbacks"] = list(as_class_path(job["callbacks"]).values())
    return parse(parser, {"seed_everything": job["seed"], **parts, "trainer": trainer})


@pytest.mark.parametrize("name", FILES)
def test_every_leaf_is_that_of_the_job(parser, name):
    theirs = parse(parser, yaml.safe_load((CONFIGS / "lightning_cli" / f"{name}.yaml").read_text()))
    ours = parse_job(parser, name, JOBS.get(name, [f"experiment={name}"]))
    pairs = {
        place: (theirs.get(place, "no such key"), ours.get(place, "no such key"))
        for place in {*theirs, *ours} - DIFFERENT.get(name, set())
    }
    assert not {place: pair for place, pair in pairs.items() if pair[0] != pair[1]}
