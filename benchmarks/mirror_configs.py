"""Write every experiment's Hydra config once more as a config of LightningCLI.

    python benchmarks/mirror_configs.py

Files in ``configs/lightning_cli`` that say they are made here are written anew, those written by
hand are left alone; a test compares every leaf of both with the job that the file mirrors.
"""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

CONFIGS = Path(str(resources.files("saflex_lightning.configs")))
MARK = "Made by benchmarks/mirror_configs.py"
HEAD = """\
# experiment={name} of saflex-train for LightningCLI: same classes, same settings.
# Made by benchmarks/mirror_configs.py; change configs/experiment/{name}.yaml instead.
#
#   saflex fit --config configs/lightning_cli/{name}.yaml{keep}
#   saflex test --config configs/lightning_cli/{name}.yaml --trainer.logger=false \\
#     --ckpt_path {weights}
"""
KEEP = " --trainer.enable_checkpointing=true"

Place = tuple[str, ...]


def list_experiments() -> list[str]:
    """Return the names of the experiments."""
    return sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))


def read_comments(file: Path) -> Iterator[tuple[Place, str]]:
    """Yield the place in the composed config and the comment of every commented key of a file."""
    text = file.read_text()
    package = re.search(r"# @package (\S+)", text)
    place = package.group(1) if package else file.parent.name
    root = [] if place == "_global_" else place.split(".")
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):(?: [^#]*?)?(?:  ?# (.*))?$", line)
        if found:
            indent, key, comment = len(found.group(1)), found.group(2), found.group(3)
            stack = [entry for entry in stack if entry[0] < indent] + [(indent, key)]
            if comment:
                yield (*root, *(name for _, name in stack)), comment


def collect_comments(choices: dict[str, str | None]) -> dict[Place, str]:
    """Return the comments of every place in a composition; those of the experiment win.

    Args:
        choices: The file that was chosen in each group.
    """
    ordered = sorted(choices.items(), key=lambda item: item[0] == "experiment")
    files = [
        file
        for group, choice in ordered
        if choice is not None and (CONFIGS / group).is_dir()
        for file in list_bases(CONFIGS / group / f"{choice}.yaml")
    ]
    return {place: comment for file in files for place, comment in read_comments(file)}


def list_bases(file: Path) -> list[Path]:
    """Return the files of its group that a file builds on, the most basic first, and itself."""
    defaults = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    bases = [name for name in defaults if isinstance(name, str) and name != "_self_"]
    return [*(part for base in bases for part in list_bases(file.with_stem(base))), file]


def to_classes(value: Any) -> Any:
    """Turn Hydra's ``_target_`` into LightningCLI's ``class_path`` and ``init_args``."""
    if isinstance(value, list):
        return [to_classes(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    settings = {key: to_classes(entry) for key, entry in value.items() if key != "_target_"}
    if "_target_" not in value:
        return settings
    return {"class_path": value["_target_"], "init_args": settings}


def write_lines(value: Any, comments: dict[Place, str], place: Place, indent: str) -> Iterator[str]:
    """Yield the lines of a mapping, each leaf with its comment."""
    for key, entry in value.items():
        own = place if key == "init_args" else (*place, key)
        comment = f"  # {comments[own]}" if own in comments else ""
        if isinstance(entry, dict) and entry:
            yield f"{indent}{key}:"
            yield from write_lines(entry, comments, own, indent + "  ")
        elif key == "callbacks":
            yield f"{indent}{key}:"
            for name, callback in entry:
                lines = list(write_lines(callback, comments, ("callbacks", name), indent + "    "))
                yield lines[0].replace(f"{indent}    ", f"{indent}  - ", 1)
                yield from lines[1:]
        else:
            text = yaml.safe_dump(entry, default_flow_style=True, width=10_000).strip()
            yield f"{indent}{key}: {text.removesuffix('...').strip()}{comment}"


def find_weights(callbacks: dict[str, Any]) -> str | None:
    """Return the checkpoint that an experiment tests at its end; None where it keeps none."""
    if "ensembling" in callbacks:
        return callbacks["ensembling"]["filepath"]
    if "best" in callbacks:
        return f"{callbacks['best']['dirpath']}/{callbacks['best']['filename']}.ckpt"
    return None


def make_mirror(experiment: str) -> str:
    """Return the text of an experiment's file for LightningCLI."""
    with initialize_config_module(config_module="saflex_lightning.configs", version_base="1.3"):
        overrides = [f"experiment={experiment}", f"output_dir=outputs/{experiment}"]
        composed = compose("train", overrides=overrides, return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    del composed.hydra
    config: Any = OmegaConf.to_container(composed, resolve=True)
    trainer = to_classes(config["trainer"])["init_args"]
    trainer["callbacks"] = [(key, to_classes(value)) for key, value in config["callbacks"].items()]
    comments = collect_comments(choices)
    comments["seed_everything",] = "seed of weights and SAFLEX"
    mirror = {
        "seed_everything": config["seed"],
        "trainer": trainer,
        "model": to_classes(config["model"]),
        "data": to_classes(config["data"]),
    }
    lines = write_lines(mirror, comments, (), "")
    weights = find_weights(config["callbacks"])
    head = HEAD.format(name=experiment, keep="" if weights else KEEP, weights=weights or "FILE")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Write the files."""
    for experiment in list_experiments():
        file = CONFIGS / "lightning_cli" / f"{experiment}.yaml"
        if not file.is_file() or MARK in file.read_text():
            file.write_text(make_mirror(experiment))
            print(file.relative_to(CONFIGS))


if __name__ == "__main__":
    main()
