"""What a training step costs in a Trainer: time, FLOPs, launches, waits and memory beside plain.

    python benchmarks/step_time.py --json step_time.json --plot step_time.png
    python benchmarks/step_time.py --models resnet50 vit_s --batch-size 64 --precision bf16-mixed

In each fit blocks of refined and of plain steps take turns, as with ``measure_overhead=True``; the
extra time is that of a refined block over the plain one after it, given as median and quartiles.
``FLOPs`` is what the extra computing alone would cost. ``launches`` are calls that a GPU would
run, and ``waits`` looks at values that would wait for it, both counted, per step, beside those of
plain steps. ``memory`` is the peak of a fresh process beyond what it held before the first step,
less the plain one's, and over it; a fit of a tiny net has loaded the code of libraries before.
Rivals (`step_rivals.py`) see as many validation rows in each step as SAFLEX in each fourth.

Rows are written to the file of ``--json`` as they are measured; a second call measures what is
missing there.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from step_models import CASES, LARGE, Cell, Net, Repeated, draw_batches
from step_rivals import RIVALS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from saflex_lightning import SAflexCallback
from saflex_lightning.fit.meter import Meter
from saflex_lightning.functional import make_settings

KINDS = {
    "robust": {},
    "gradient": {"preset": "gradient"},
    "paper": {"preset": "paper"},
    "paper, lean": {
        "preset": "paper",
        "engine": "finite_difference",
        "refresh_every_n_steps": 4,
        "val_batch_ratio": 0.25,
    },
}
ALONE = ("robust", "gradient")  # measured on batches of augmented rows alone too
FEWEST_BLOCKS = 2  # of each kind
MEMORY_STEPS = 13
TINY_ROWS = 8  # of a batch of the net that loads the libraries
MMAP_BYTES = 2**16  # memory of more is given back at once
LONGEST = 5.5  # bar of the picture
# Calls that launch nothing: views, memory without values, and questions of types.
NO_LAUNCH = {
    "_fw_primal",
    "_has_same_storage_numel",
    "_make_dual",
    "_record_function_enter_new",
    "_record_function_exit",
    "_reshape_alias",
    "_unpack_dual",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "permute",
    "promote_types",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
WAITS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim"}


# What is measured


class Calls(TorchDispatchMode):
    """Counts launches and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        self.launches += name not in NO_LAUNCH
        by_mask = name == "index" and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        self.waits += by_mask or name in WAITS
        found = func(*args, **kwargs)
        if name == "_to_copy" and getattr(args[0], "is_cuda", False):  # vmap copies numbers too
            self.waits += not (found.is_cuda or kwargs.get("non_blocking"))
        return found


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Let the package believe on a CPU that looks wait."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("saflex_lightning.") and hasattr(module, "looking_is_free"):
                stack.enter_context(patch.object(module, "looking_is_free", lambda _: False))
        yield


@contextmanager
def counted_copies(calls: Calls) -> Iterator[None]:
    """Count copies to the CPU among the looks; those of a GPU's tensors are counted already."""
    own = Tensor.cpu

    def cpu(tensor, *args, **kwargs):
        calls.waits += not tensor.is_cuda
        return own(tensor, *args, **kwargs)

    with patch.object(Tensor, "cpu", cpu):
        yield


class First(pl.Callback):
    """Begins each step: the first callback."""

    def __init__(self, meter: Meter, *, counts: bool = False) -> None:
        self.meter, self.counts = meter, counts
        self.found = {is_plain: {"launches": 0, "waits": 0, "flops": 0} for is_plain in (0, 1)}
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Start the clock, or to count."""
        pl_module.is_plain = self.meter.is_plain(batch_idx)
        if not self.counts:
            self.meter.begin(batch_idx, pl_module.device)
        elif batch_idx % (self.meter.counted + 1):
            self.calls, self.flops = Calls(), FlopCounterMode(display=False)
            self.stack.enter_context(counted_copies(self.calls))
            self.stack.enter_context(self.flops)
            self.stack.enter_context(self.calls)

    def on_exception(self, trainer, pl_module, exception):
        """Leave nothing behind."""
        self.stack.close()


class Last(pl.Callback):
    """Ends each step: the last callback.

    Args:
        first: The first one.
        seconds: After which, and `FEWEST_BLOCKS`, a fit ends.
    """

    def __init__(self, first: First, seconds: float) -> None:
        self.first, self.ends = first, time.perf_counter() + seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop the clock, or count."""
        first = self.first
        first.meter.end()
        first.stack.close()
        if first.counts and batch_idx % (first.meter.counted + 1):
            found = first.found[pl_module.is_plain]
            found["launches"] += first.calls.launches / first.meter.counted
            found["waits"] += first.calls.waits / first.meter.counted
            found["flops"] += first.flops.get_total_flops() / first.meter.counted
        enough = len(first.meter.plain) >= FEWEST_BLOCKS
        trainer.should_stop = enough and time.perf_counter() > self.ends


def peak_bytes() -> int:
    """Return the most memory this process has held: on the GPU if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Held(pl.Callback):
    """Notes the memory that is held before the first step."""

    def on_train_start(self, trainer, pl_module):
        """Note it."""
        self.bytes = peak_bytes()


def fit(cell: Cell, args: argparse.Namespace, steps: int, *around: pl.Callback) -> None:
    """Train.

    Args:
        cell: What to train, and how.
        args: The command line.
        steps: Training steps.
        *around: The first callback and the last one, if refined and plain blocks take turns.
    """
    rows = args.batch_size or CASES[cell.model].rows
    module = Net(cell, rows)
    callbacks = list(around)
    if cell.kind in KINDS:
        settings = {"seed": 0, "measure_overhead": len(around) > 1, **KINDS[cell.kind]}
        callbacks.insert(1, SAflexCallback(**settings))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=args.device,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        precision=args.precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = draw_batches(CASES[cell.model], rows, union=cell.batch == "union")
    trainer.fit(module, Repeated(batches, steps))


def measure_memory(cell: Cell, args: argparse.Namespace) -> float:
    """Return the peak beyond what was held before the first step, in bytes; of a fresh process."""
    quiet()
    torch.set_num_threads(args.threads)
    tiny = argparse.Namespace(**{**vars(args), "batch_size": TINY_ROWS})
    fit(cell._replace(model="qsar"), tiny, MEMORY_STEPS)
    held = Held()
    fit(cell, args, MEMORY_STEPS, held)
    return peak_bytes() - held.bytes


def measure_blocks(cell: Cell, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the seconds of a step in refined blocks and in the plain ones after them."""
    settings = make_settings(**KINDS.get(cell.kind, {}))
    ends, refined, plain = time.perf_counter() + args.seconds, [], []
    while not plain or time.perf_counter() < ends:
        meter = Meter(settings, getattr(time, args.clock))
        first = First(meter)
        fit(cell, args, meter.batches, first, Last(first, ends - time.perf_counter()))
        pairs = zip(meter.refined, meter.plain, strict=False)  # a fit may end between the two
        for found, blocks in zip((refined, plain), zip(*pairs, strict=True), strict=True):
            found += [block / meter.counted for block in blocks]
    return refined, plain


def measure(cell: Cell, args: argparse.Namespace) -> dict:
    """Return a row of results: times, counts and memory."""
    settings = make_settings(**KINDS.get(cell.kind, {}))
    counting = First(Meter(settings), counts=True)
    steps = 2 * (counting.meter.counted + 1)
    with as_on_an_accelerator():
        fit(cell, args, steps, counting, Last(counting, 0))
    plain, refined = counting.found[True], counting.found[False]

    refined_blocks, plain_blocks = measure_blocks(cell, args)
    ratios = [one / other for one, other in zip(refined_blocks, plain_blocks, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    found = {
        "ratio": median,
        "quartiles": [lower, upper],
        "blocks": len(ratios),
        "plain_seconds": statistics.median(plain_blocks),
        "flops": refined["flops"] / plain["flops"],
        "launches": refined["launches"] - plain["launches"],
        "plain_launches": plain["launches"],
        "waits": refined["waits"] - plain["waits"],
    }
    if args.memory:
        with fresh_process() as process:
            found["memory"] = process.apply(measure_memory, (cell, args))
    return found


@contextmanager
def fresh_process() -> Iterator:
    """Give one whose libraries are loaded, and whose freed tensors are no longer resident."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_BYTES)  # glibc reads it when a process starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torchvision", "saflex_lightning"])
    with context.Pool(1) as pool:
        yield pool


def cells(models: list[str], kinds: list[str]) -> Iterator[Cell]:
    """Yield what is to be measured."""
    for model in models:
        for kind in kinds:
            yield Cell(model, "union", kind)
        for kind in ALONE:
            if kind in kinds:
                yield Cell(model, "alone", kind)


def run(args: argparse.Namespace) -> dict:
    """Measure what the file does not hold yet, and write each row to it."""
    results = {"settings": describe(args), "rows": []}
    file = Path(args.json) if args.json else None
    if file and file.exists():
        results = json.loads(file.read_text())
        if results["settings"] != describe(args):
            raise SystemExit(
                f"Expected the settings of {file}, {results['settings']}, but got "
                f"{describe(args)}. Name another file."
            )
    done = {Cell(row["model"], row["batch"], row["kind"]) for row in results["rows"]}
    for cell in cells(args.models, args.kinds):
        if cell in done:
            continue
        row = cell._asdict()
        try:
            row |= measure(cell, args)
        except Exception as error:  # what a method cannot do is a result
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if args.memory and cell.model not in results.setdefault("plain_memory", {}):
            with fresh_process() as process:
                plain = Cell(cell.model, cell.batch, "plain")
                memory = process.apply(measure_memory, (plain, args))
            results["plain_memory"][cell.model] = memory
        results["rows"].append(row)
        print(table_row(row, results), flush=True)
        if file:
            file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def describe(args: argparse.Namespace) -> dict:
    """Return what results depend on."""
    processor = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor,
        "precision": args.precision,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "clock": args.clock,
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "python": platform.python_version(),
    }


# What is shown

HEADER = (
    "| model | batch | step | plain | time (quartiles) | FLOPs | launches | waits | memory |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: dict, results: dict) -> str:
    """Return a line of the table."""
    start = f"| {row['model']} | {row['batch']} | {row['kind']} |"
    if "refused" in row:
        return f"{start} {row['refused'].split(':')[0]} | | | | | |"
    percent = [f"{100 * (value - 1):+.0f}" for value in (row["ratio"], *row["quartiles"])]
    memory = "-"
    if "memory" in row:
        plain = results["plain_memory"][row["model"]]
        memory = f"{(row['memory'] - plain) / 2**20:+.1f} MB, x {row['memory'] / plain:.2f}"
    return (
        f"{start} {1000 * row['plain_seconds']:.3g} ms | {percent[0]} % ({percent[1]} to "
        f"{percent[2]}) | {100 * (row['flops'] - 1):+.0f} % | {row['launches']:+.0f} to "
        f"{row['plain_launches']:.0f} | {row['waits']:+.1f} | {memory} |"
    )


def plot(results: dict, path: str) -> None:
    """Draw the extra time of each kind of step, and the FLOPs', a panel for each model."""
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if "refused" not in row and row["batch"] == "union"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(2.6 * len(models) + 1.5, 0.3 * len(kinds) + 1.2), squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        places = [kinds.index(row["kind"]) for row in own]
        ratios = [row["ratio"] for row in own]
        spread = [[abs(row["quartiles"][side] - row["ratio"]) for row in own] for side in (0, 1)]
        colors = ["tab:blue" if row["kind"] in KINDS else "tab:gray" for row in own]
        axis.barh(places, ratios, xerr=spread, color=colors, error_kw={"linewidth": 1})
        axis.plot([row["flops"] for row in own], places, "k|", markersize=10)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(kinds)), kinds if axis is axes[0][0] else [])
        axis.set_xlim(0, LONGEST)
        for place, ratio in zip(places, ratios, strict=True):
            if ratio > LONGEST:
                axis.text(LONGEST, place, f"{ratio:.0f} ", ha="right", va="center", color="white")
        axis.set_ylim(len(kinds) - 0.5, -0.5)
        axis.set_title(f"{model}, {1000 * own[0]['plain_seconds']:.3g} ms", fontsize=9)
        axis.set_xlabel("time over plain", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def quiet() -> None:
    """Leave out what Lightning says at the start of every fit."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning_utilities.core.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_parser(text: str) -> argparse.ArgumentParser:
    """Return one of what the benchmarks of steps share."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clocks = ("perf_counter", "process_time")
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument(
        "--batch-size", type=int, help="rows; else 128, or 32 of networks that take long"
    )
    parser.add_argument("--seconds", type=float, default=3, help="for the steps of a line")
    parser.add_argument("--clock", choices=clocks, default=clocks[0], help="CPU time: the second")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the numbers; what it holds is not measured again")
    return parser


def main() -> None:
    """Measure what the command line asks for, and show it."""
    kinds = [*KINDS, *RIVALS]
    parser = make_parser(__doc__)
    models = [name for name in CASES if torch.cuda.is_available() or name not in LARGE]
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=models)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--plot", help="file for the picture")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    results = run(args)
    print(f"\n{json.dumps(results['settings'])}\n\n{HEADER}")
    print("\n".join(table_row(row, results) for row in results["rows"]))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
