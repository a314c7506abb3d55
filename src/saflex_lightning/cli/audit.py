"""``saflex-audit``: how likely is each label of a folder, a manifest or a table right?"""

import argparse
import sys
from pathlib import Path

import torch
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning.audit.items import ImageInputs
from saflex_lightning.audit.judging import ROWS, UNREADABLE, Audit, judge_items, read_items
from saflex_lightning.audit.sources import (
    Sources,
    open_run,
    read_paths,
    read_run_rows,
    read_shipped,
)
from saflex_lightning.cli.quiet import silence_hints
from saflex_lightning.insight.figures import can_draw, draw_images
from saflex_lightning.insight.images import DoubtedImage
from saflex_lightning.insight.summary import Names
from saflex_lightning.recipes.tabular.csv_file import Roles

__all__ = ["main"]

GRID = "saflex_audit.png"
_MEANING = {
    "keep": "more likely right than wrong",
    "doubt": "more likely wrong than right",
    "relabel": "wrong, and the suggested label is likely, by two standard errors",
    UNREADABLE: "cannot be read",
}
_EPILOG = """
Without arguments the blood cells that ship with the package are judged, a fifth of whose labels
were made wrong. POOL and TRUSTED are each a folder with one folder of images for each class, a
manifest with the columns file and class, or a table in .csv (with --target) or .npz. Without POOL
the training rows of RUN_DIR, or its pool, are judged by the rows that steered it.
"""


def main() -> None:
    """Judge what the process's arguments name."""
    given = _read_arguments()
    silence_hints()
    try:
        sources = _find_sources(given)
        total = len(sources.doubted.target)
        columns = (
            TextColumn("judged"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("", total=total)
            audit = judge_items(
                sources,
                given.output,
                batch_size=given.batch_size,
                num_workers=given.workers,
                device=given.device,
                on_rows=lambda rows: progress.update(task, completed=rows),
            )
        _show(sources, audit, given.output)
    except KeyboardInterrupt:
        sys.exit("saflex-audit: stopped. The same command goes on from here.")
    except (HydraException, ImportError, MisconfigurationException, OSError, ValueError) as error:
        sys.exit(f"saflex-audit: {error}")


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="saflex-audit", description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("pool", type=Path, nargs="?", metavar="POOL", help="items to judge")
    add("--trusted", type=Path, help="items whose labels are right, 10 or more of each class")
    add("--run", type=Path, metavar="RUN_DIR", help="a run of saflex-train (or a checkpoint in it)")
    add("-o", "--output", type=Path, default=Path("saflex_audit"), help="folder; %(default)s")
    add("--target", help="of CSV tables: the column of the labels")
    add("--categorical", nargs="+", default=[], help="of CSV tables: columns of levels")
    add("--numeric", nargs="+", help="of CSV tables: columns of numbers; all others")
    add("--batch-size", type=_positive, default=256, help="items at a time; %(default)s")
    add("--workers", type=_count, default=0, help="processes that load images; %(default)s")
    add("--device", type=_device, default="cpu", help="of the network, as cuda; %(default)s")
    given = parser.parse_args()
    if (given.pool is None) != (given.trusted is None):
        parser.error(
            "expected items to judge and trusted ones, POOL --trusted TRUSTED, but got one of the "
            "two; give both, or leave both out"
        )
    return given


def _find_sources(given: argparse.Namespace) -> Sources:
    run = None if given.run is None else open_run(given.run)
    if given.pool is not None:
        numeric = None if given.numeric is None else tuple(given.numeric)
        roles = given.target and Roles(given.target, tuple(given.categorical), numeric)
        return read_paths(given.pool, given.trusted, roles=roles, run=run)
    return read_shipped() if run is None else read_run_rows(run)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} a second")


def _positive(text: str) -> int:
    return _integer(text, 1)


def _count(text: str) -> int:
    return _integer(text, 0)


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device of torch, but {text!r} is none"
        ) from error
    return text


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected an integer of {least} or more, but got {text!r}"
        )
    return int(text)


# What was found


def _show(sources: Sources, audit: Audit, folder: Path) -> None:
    """Print what was found, and draw the images that are doubted most."""
    console = Console()
    places = {row: place for place, (_, row) in enumerate(audit.doubted)}
    doubted = {
        places[row]: (row, item) for row, item in enumerate(read_items(folder)) if row in places
    }
    items = [doubted[place] for place in sorted(doubted)]
    table = Table("item", "given", "suggested", "right with", "decision", box=box.SIMPLE)
    table.title = "The labels that are doubted most"
    for _, item in items:
        chance = f"{item.score:.3f} ± {item.standard_error:.3f}"
        words = (item.item, item.given, item.suggested, chance, item.decision)
        table.add_row(*map(Text, words))  # `Text` is printed as it is
    console.print(table)
    table = Table("decision", "items", "the given label is", box=box.SIMPLE)
    for decision, number in audit.decisions.items():
        if number or decision != UNREADABLE:
            table.add_row(decision, str(number), _MEANING[decision])
    console.print(table)
    share, error = (100 * part for part in audit.wrong_share)
    console.print(f"Estimated share of wrong labels: {share:.0f} ± {error:.0f} %")
    if sources.wrong is not None:
        scores = torch.tensor([item.score or 0.0 for item in read_items(folder)])
        console.print(
            f"{sources.wrong.float().mean():.0%} were made wrong on purpose: the score tells them "
            f"from right ones with an AUROC of {binary_auroc(scores, (~sources.wrong).long()):.3f}."
        )
    console.print(Text(f"All items: {folder / ROWS}"), soft_wrap=True)
    inputs = sources.doubted.inputs
    if not isinstance(inputs, ImageInputs):
        return
    if not can_draw():
        console.print("For a grid of images: pip install 'saflex-lightning[report]'")
        return
    classes = list(sources.doubted.classes)
    images = [
        DoubtedImage(
            inputs[row],
            belief=audit.doubted[place][0],
            index=row,
            given=classes.index(item.given),
            suggested=classes.index(item.suggested),
        )
        for place, (row, item) in enumerate(items)
    ]
    draw_images(images, Names(classes=classes)).savefig(folder / GRID)
    console.print(Text(f"Images: {folder / GRID}"), soft_wrap=True)


if __name__ == "__main__":
    main()
