"""Fill a pool with generated images: one file and one manifest row each, resumable."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from saflex_lightning.data.checks import check
from saflex_lightning.data.draws import mix_seeds
from saflex_lightning.recipes.folders import ClassFolders
from saflex_lightning.recipes.manifest import (
    MANIFEST,
    PoolRow,
    add_row,
    check_generator,
    read_listed,
)

__all__ = ["Task", "class_words", "fill_pool", "folder_name", "plan_edits", "plan_new"]


class Task(NamedTuple):
    """One image to generate.

    Attributes:
        row: What the manifest will say about it.
        text: The prompt with the class name filled in.
        source: Number of the training image it is made from; -1 for none.
        seed: Seed of its draws; a function of the run's seed and of what the image is, so that it
            depends neither on the batch size nor on what was made before.
    """

    row: PoolRow
    text: str
    source: int
    seed: int


def class_words(name: str) -> str:
    """Return the name of a class folder as words for a prompt.

    Example:
        >>> class_words("001.Black_footed_Albatross")
        'Black footed Albatross'
    """
    return re.sub(r"^\d+\.", "", name).replace("_", " ")


def folder_name(prompt: str) -> str:
    """Return a prompt as the name of a folder.

    Example:
        >>> folder_name("a {class}, in the rain")
        'a_class_in_the_rain'
    """
    return re.sub(r"[^\w.-]+", "_", prompt).strip("_")


def plan_edits(
    train: ClassFolders,
    prompts: Sequence[str],
    *,
    generator: str,
    settings: str = "",
    images_per_source: int,
    seed: int,
) -> Iterator[Task]:
    """Plan images made from training images.

    They go to ``{generator}/{prompt}/{settings}/{class}/{source}-{k}.png``.

    Args:
        train: Training images.
        prompts: What is to be seen; ``{class}`` stands for the class name.
        generator: Name of the generator.
        settings: Name of a folder that tells strength and guidance; left out where empty.
        images_per_source: Images from each training image by each prompt.
        seed: Seed of the run.

    Raises:
        ValueError: If there is no prompt, two would share a folder, or a name is none of a folder.
    """
    _check_names(generator, prompts)
    for number, prompt in enumerate(prompts):
        for source, file in enumerate(train.files):
            label = train.classes[int(train.target[source])]
            folder = Path(generator, folder_name(prompt), settings, label)
            for k in range(images_per_source):
                yield Task(
                    PoolRow(
                        file=(folder / f"{source}-{k}.png").as_posix(),
                        label=label,
                        source=file.relative_to(train.root).as_posix(),
                        generator=generator,
                        prompt=prompt,
                    ),
                    text=prompt.replace("{class}", class_words(label)),
                    source=source,
                    seed=mix_seeds(seed, number, source, k),
                )


def plan_new(
    classes: Sequence[str],
    prompts: Sequence[str],
    *,
    generator: str,
    settings: str,
    images_per_class: int,
    seed: int,
) -> Iterator[Task]:
    """Plan images made from text alone.

    They go to ``{generator}/{prompt}/{settings}/{class}/{k}.png`` and have no source.

    Args:
        classes: Names of the classes.
        prompts: See `plan_edits`.
        generator: See `plan_edits`.
        settings: See `plan_edits`.
        images_per_class: Images of each class by each prompt.
        seed: Seed of the run.

    Raises:
        ValueError: If there is no prompt, two would share a folder, or a name is none of a folder.
    """
    _check_names(generator, prompts)
    for number, prompt in enumerate(prompts):
        for position, label in enumerate(classes):
            folder = Path(generator, folder_name(prompt), settings, label)
            for k in range(images_per_class):
                file = (folder / f"{k}.png").as_posix()
                yield Task(
                    PoolRow(file, label, "", generator, prompt),
                    text=prompt.replace("{class}", class_words(label)),
                    source=-1,
                    seed=mix_seeds(seed, number, position, k),
                )


def fill_pool(
    root: Path,
    tasks: Iterator[Task],
    make: Callable[[list[Task]], Sequence[Image]],
    *,
    batch_size: int,
) -> tuple[int, int]:
    """Make the images that are not there yet, and list all of them in the manifest.

    An image appears under its name only when it is complete, so a run that was stopped is resumed
    by the same command.

    Args:
        root: Folder of the pool.
        tasks: What to make.
        make: Makes one image for each task of a batch.
        batch_size: Images that are made together.

    Returns:
        Number of images made and of images that were there.

    Raises:
        TypeError: If the batch size is no integer.
        ValueError: If it is below 1, or the manifest that is there cannot be read or goes on.
    """
    check("a positive integer", batch_size=batch_size)
    listed = read_listed(root / MANIFEST)
    todo: list[Task] = []
    there = 0
    for task in tasks:
        if (root / task.row.file).is_file():
            there += 1
            add_row(root / MANIFEST, task.row, listed)
        else:
            todo.append(task)
    for first in range(0, len(todo), batch_size):
        batch = todo[first : first + batch_size]
        for task, image in zip(batch, make(batch), strict=True):
            file = root / task.row.file
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".part")
            image.save(unfinished, format="PNG")
            os.replace(unfinished, file)
            add_row(root / MANIFEST, task.row, listed)
    return len(todo), there


def _check_names(generator: str, prompts: Sequence[str]) -> None:
    check("a name", generator=generator)
    check("a list of names", prompts=prompts)
    check_generator(generator, "`generator` to be")
    if Path(generator).name != generator or generator == "..":
        raise ValueError(
            f"Expected `generator` to be the name of a folder, but got {generator!r}. Leave out "
            "slashes and dots: `output` says where the pool is."
        )
    folders = [folder_name(prompt) for prompt in prompts]
    if not prompts or {"", ".", ".."} & {*folders} or len({*folders}) < len(folders):
        raise ValueError(
            "Expected `prompts` to be at least one text, each with words of its own, but got "
            f"{list(prompts)}, whose folders would be {folders}. Change the words."
        )
