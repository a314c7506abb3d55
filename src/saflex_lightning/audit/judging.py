"""Judge items batch by batch; what is judged is on the disk, and a stopped audit goes on there."""

import csv
import hashlib
import heapq
import importlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from saflex_lightning.data.cells import from_cell
from saflex_lightning.evidence.labels import DECISIONS, LabelJudge
from saflex_lightning.insight.write import as_cells

from .items import Items
from .sources import Sources

__all__ = ["ROWS", "STATE", "UNREADABLE", "Audit", "JudgedItem", "judge_items", "read_items"]

ROWS, PARQUET, STATE = "saflex_audit.csv", "saflex_audit.parquet", "saflex_audit.json"
UNREADABLE = "unreadable"
_VERSION = "1"  # of what is written; another one is no audit to go on with
_WATCHED = 2048  # items by which the share of wrong labels is estimated
_MOST_DOUBTED = 16  # items that are kept for a closer look
_CHUNK = 65_536  # rows of Parquet that are written at a time


class JudgedItem(NamedTuple):
    """A row of the file; without scores an item is unreadable, and its numbers are None."""

    item: str
    given: str
    score: float | None  # probability that the given label is right
    standard_error: float | None
    suggested: str
    decision: str


@dataclass
class Audit:
    """How far an audit has come, and what it has found.

    Attributes:
        stamp: Tells what is judged, and by what, from everything else.
        rows: Items that were judged.
        size: Bytes of the file that hold them.
        wrong_share: Estimated share of wrong labels, in [0, 1], and its standard error.
        decisions: Items of each decision.
        doubted: Score and number of the items whose labels are least likely right.
    """

    stamp: str
    rows: int = 0
    size: int = 0
    wrong_share: tuple[float, float] = (0.0, 1.0)
    decisions: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys([*DECISIONS, UNREADABLE], 0)
    )
    doubted: list[tuple[float, int]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write it in the place of the last one, whole or not at all."""
        unfinished = folder / f"{STATE}.part"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        unfinished.replace(folder / STATE)


def judge_items(
    sources: Sources,
    folder: Path,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str = "cpu",
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Audit:
    """Judge all items, into ``saflex_audit.csv`` in their order.

    An audit that was stopped goes on where it was, with the same result as one that was not. Where
    pyarrow is installed, ``saflex_audit.parquet`` is written at the end.

    Args:
        sources: Items, trusted items and network.
        folder: Where the files go.
        batch_size: Items that are judged at a time.
        num_workers: Processes that load them.
        device: Where the network is.
        on_rows: Called with the number of items that are judged so far.

    Raises:
        FileExistsError: If the folder holds another audit.
        ValueError: If the trusted items cannot judge, or no item can be read.
    """
    parts = (_VERSION, str(batch_size), sources.origin)
    parts += (sources.trusted.fingerprint(), sources.doubted.fingerprint())
    audit = _open(folder, hashlib.sha256("\0".join(parts).encode()).hexdigest())
    total = len(sources.doubted.target)
    on_rows(audit.rows)
    if audit.rows == total:
        return audit
    network = sources.network.eval().to(device)

    def score(items: Items, rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
        kept: Any = Subset(items.inputs, rows)  # type: ignore[arg-type]  a sequence does
        for batch in DataLoader(kept, batch_size, num_workers=num_workers):
            yield _scores(network, batch, device)

    judge = _make_judge(sources.trusted, score)
    audit.wrong_share = _watch(judge, sources.doubted, score)
    folder.mkdir(parents=True, exist_ok=True)
    audit.write(folder)
    with (folder / ROWS).open("ab") as stream:
        stream.truncate(audit.size)
        if not audit.size:
            stream.write(_as_csv([JudgedItem._fields]))
        for scores, known in score(sources.doubted, range(audit.rows, total)):
            judged = _judge_batch(judge, sources.doubted, audit, scores, known)
            stream.write(_as_csv(judged))
            stream.flush()
            audit.rows, audit.size = audit.rows + len(judged), stream.tell()
            audit.write(folder)
            on_rows(audit.rows)
    _write_parquet(folder)
    return audit


def read_items(folder: Path) -> Iterator[JudgedItem]:
    """Yield the items of a file."""
    with (folder / ROWS).open(newline="", encoding="utf-8") as stream:
        for item, given, score, error, suggested, decision in islice(csv.reader(stream), 1, None):
            yield JudgedItem(
                from_cell(item),
                from_cell(given),
                float(score) if score else None,
                float(error) if error else None,
                from_cell(suggested),
                decision,
            )


def _open(folder: Path, stamp: str) -> Audit:
    """Return how far an audit has come; refuse a folder that holds another one."""
    file = folder / ROWS
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"Expected `--output` to be a folder, but {folder} is a file. Give another one."
        )
    if not file.exists():
        return Audit(stamp)
    found: Any = None
    with suppress(OSError, TypeError, ValueError):
        found = Audit(**json.loads((folder / STATE).read_text()))
        found.wrong_share = tuple(found.wrong_share)  # JSON has lists
        found.doubted = [(score, row) for score, row in found.doubted]
    if found is None or found.stamp != stamp or found.size > file.stat().st_size:
        raise FileExistsError(
            f"Expected {file} to be a part of this audit, to go on with, but it is from other "
            "items, another network or other settings, or was changed. Give another folder as "
            "`--output`, or remove the file."
        )
    return found


def _make_judge(trusted: Items, score: Any) -> LabelJudge:
    if len(trusted.target.unique()) < 2:
        raise ValueError(
            f"Expected trusted items of two classes or more, but got {len(trusted.target)} items "
            f"of {list(trusted.classes)}. Give 10 or more of each class, whose labels are right."
        )
    found = []
    for scores, known in score(trusted, range(len(trusted.target))):
        row = sum(map(len, found)) + int(known.int().argmin())
        trusted.check_readable(row, is_readable=bool(known.all()))
        found.append(scores)
    return LabelJudge(torch.cat(found), trusted.target, len(trusted.classes))


def _watch(judge: LabelJudge, items: Items, score: Any) -> tuple[float, float]:
    """Let the judge estimate the share of wrong labels, by items drawn at random."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(items.target), generator=draws)[:_WATCHED].sort().values
    parts = zip(*score(items, rows.tolist()), strict=True)
    scores, known = (torch.cat(part) for part in parts)
    if not known.any():
        raise ValueError(
            f"Expected items that can be read, but none of {len(rows)} can, as "
            f"'{items.names[int(rows[0])]}'. Look whether the files are there and are images."
        )
    return judge.watch(scores[known], items.target[rows][known])


def _judge_batch(
    judge: LabelJudge, items: Items, audit: Audit, scores: Tensor, known: Tensor
) -> list[JudgedItem]:
    """Return what is thought of the next items, having counted them."""
    target = items.target[audit.rows : audit.rows + len(scores)]
    judged: list[list[Any]] = [part.tolist() for part in judge.judge(scores, target)]
    found = []
    for row, (is_known, given, score, error, suggested, decision) in enumerate(
        zip(known.tolist(), target.tolist(), *judged, strict=True), audit.rows
    ):
        item = JudgedItem(items.names[row], items.classes[int(given)], None, None, "", UNREADABLE)
        if is_known:
            words = items.classes[int(suggested)], DECISIONS[decision]
            item = JudgedItem(*item[:2], score, error, *words)
            audit.doubted.append((score, row))
        audit.decisions[item.decision] += 1
        found.append(item)
    audit.doubted = heapq.nsmallest(_MOST_DOUBTED, audit.doubted)
    return found


@torch.inference_mode()
def _scores(network: nn.Module, batch: Any, device: str) -> tuple[Tensor, Tensor]:
    """Return the scores of a batch, 0 where they are not known, and where they are."""
    parts = [part.to(device) for part in (batch if isinstance(batch, (tuple, list)) else [batch])]
    known = torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
    parts = [part.nan_to_num(0, 0, 0) for part in parts]
    scores = network(*parts)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise ValueError(
            "Expected a network from inputs to scores, (batch, scores), but "
            f"{type(network).__name__} returns something else. Write scores into a table, and "
            "give that."
        )
    known = (known & scores.isfinite().all(1)).cpu()
    return scores.float().cpu().where(known.unsqueeze(1), 0), known


def _as_csv(rows: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(as_cells, rows))
    return text.getvalue().encode()


def _write_parquet(folder: Path) -> None:
    """Write the file as Parquet too, in parts, where pyarrow is installed."""
    with suppress(ImportError):
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
        kinds = [
            arrow.float64() if name in {"score", "standard_error"} else arrow.string()
            for name in JudgedItem._fields
        ]
        schema = arrow.schema(list(zip(JudgedItem._fields, kinds, strict=True)))
        items = read_items(folder)
        with parquet.ParquetWriter(folder / PARQUET, schema) as writer:
            while chunk := list(islice(items, _CHUNK)):
                columns = [list(column) for column in zip(*chunk, strict=True)]
                writer.write_table(arrow.table(columns, schema=schema))
