"""Measure what a refined training step costs over a plain one, in time and in memory.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models resnet18 --stem 3x3 --json step_time.json
    python benchmarks/step_time.py --models resnet50 --batch-size 64 --autocast float16   # a GPU

A step is forward, backward and Adam's update on 128 rows; a refined one adds the validation
gradient where it is due, the engine's pass and the solve, but no metrics, as a step that no logger
reads. All rows are augmented, but for the setting "union", where half of them are. Plain and
refined steps of one model take turns in one process; an overhead is the ratio of a whole refresh
interval to as many plain steps of the same round, given as median and quartiles over rounds. Peak
memory is that of a fresh process for each engine. Where small operations are launched faster than
a GPU computes, what counts is computing: ResNet-50 on images of 224 pixels, with ``--autocast``
for mixed precision, stands for that.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from saflex_lightning.engines import make_engine
from saflex_lightning.engines.direction import adam_second_moments
from saflex_lightning.functional import Settings, make_settings, solve, weighted_cross_entropy
from saflex_lightning.validation.gradient import ValidationGradient

ENGINES = ("head", "finite_difference", "forward_mode")
SETTINGS = {
    "B' = B, n = 1": partial(make_settings, "paper"),
    "B' = B/4, n = 4": partial(
        make_settings, "paper", refresh_every_n_steps=4, val_batch_ratio=0.25
    ),
    "robust": partial(make_settings, "robust"),
    "robust, union": partial(make_settings, "robust"),
}
UNION = "robust, union"
NUM_CLASSES = 8
# Shares of the time for rounds.
SHARE = {
    "tabular": 0.05,
    "mlp": 0.15,
    "vit": 0.15,
    "vit, dropout": 0.25,
    "resnet18": 0.4,
    "resnet50": 0.4,
}
LARGE = "resnet50"  # on images of 224 pixels; not measured unless named
PAPER = "42 % (MedMNIST, mean), 54 % (RandAugment), 31 % (Mixup), 81 % (tabular)"


class SmallViT(nn.Module):
    """Vision transformer for 28-pixel images: 49 patches, width 128, 4 layers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(49, 128))
        layer = nn.TransformerEncoderLayer(
            128, 4, 512, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``."""
        tokens = self.patches(images).flatten(2).mT + self.position
        return self.head(self.layers(tokens).mean(1))


def make_model(name: str, stem: str) -> nn.Module:
    """Return a model for images, or for 64 columns (``"tabular"``).

    Args:
        name: A key of `SHARE`; the perceptrons are of width 1024 (``"mlp"``) and 256, the
            transformer's dropout is 0 or 0.1.
        stem: ``"7x7"`` is torchvision's; ``"3x3"`` that of the MedMNIST experiments.
    """
    if name in {"mlp", "tabular"}:
        inputs, width = (64, 256) if name == "tabular" else (3 * 28 * 28, 1024)
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, NUM_CLASSES))
    if name.startswith("vit"):
        return SmallViT(0.1 if "dropout" in name else 0.0)
    if name == LARGE:
        return resnet50(num_classes=NUM_CLASSES).to(memory_format=torch.channels_last)
    network = resnet18(num_classes=NUM_CLASSES)
    if stem == "3x3":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network.to(memory_format=torch.channels_last)


class Training:
    """One model with its optimizer and random data, and the two kinds of steps."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        pixels = 224 if name == LARGE else 28
        shape = (64,) if name == "tabular" else (3, pixels, pixels)
        self.device = torch.device(args.device)
        self.model = make_model(name, args.stem).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randn(args.batch_size, *shape, device=self.device)
        self.target = torch.randint(NUM_CLASSES, (args.batch_size,), device=self.device)
        dtype = getattr(torch, args.autocast) if args.autocast else None
        self.autocast = torch.autocast(args.device, dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(args.device, enabled=dtype is torch.float16)

    def update(self, loss: Callable[[], Tensor]) -> None:
        """Take a training step as a Trainer does, with its autocast and its loss scaling.

        Args:
            loss: Computes the loss.
        """
        with self.autocast:
            value = loss()
        self.optimizer.zero_grad()
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def plain_step(self) -> None:
        """Train on the batch with plain cross-entropy."""
        self.update(lambda: F.cross_entropy(self.model(self.inputs), self.target))

    def make_refined_step(self, settings: Settings, *, union: bool = False) -> Callable[[], None]:
        """Return a function that trains on the batch once with SAFLEX.

        Args:
            settings: The settings.
            union: Refine the second half of the rows alone.
        """
        size = len(self.inputs)
        engine = make_engine(settings.engine, self.model, lambda: self.model(self.inputs[:8]))
        augmented = torch.arange(size, device=self.device) >= (size // 2 if union else 0)
        val_gradient = ValidationGradient(settings)
        val_rows = round(settings.val_batch_ratio * size)
        number = 0

        def refined_loss() -> Tensor:
            nonlocal number
            if val_gradient.is_due(number):
                rows = torch.randint(size, (val_rows,)).to(self.device)
                inputs, target = self.inputs[rows], self.target[rows]
                self.model.eval()
                gradient = engine.gradient(
                    lambda: self.model(inputs), lambda scores: F.cross_entropy(scores, target)
                )
                self.model.train()
                moments = adam_second_moments(engine.params, [self.optimizer])
                val_gradient.update(number, gradient, moments if settings.precondition else None)
            number += 1
            finish = engine.jvp(lambda: self.model(self.inputs), val_gradient.direction)
            scores = self.model(self.inputs)
            with torch.no_grad():
                probs = torch.softmax(scores, -1, dtype=torch.float32)
                solution = solve(finish.of(scores), probs, self.target, augmented, settings)
            return weighted_cross_entropy(scores, solution.soft_labels, solution.weights)

        return lambda: self.update(refined_loss)

    def seconds(self, step: Callable[[], None]) -> float:
        """Return how long one step takes.

        Args:
            step: The step.
        """
        started = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class Overhead(NamedTuple):
    """Overhead over a plain step, as a fraction of it."""

    lower: float
    median: float
    upper: float


def measure_time(name: str, args: argparse.Namespace) -> dict:
    """Return the plain step's seconds and the overhead of each engine and setting.

    Args:
        name: As for `make_model`.
        args: The command line.
    """
    training = Training(name, args)
    presets = {
        (engine, setting): make(engine=engine)
        for engine in args.engines
        for setting, make in SETTINGS.items()
    }
    steps = {
        (engine, setting): training.make_refined_step(preset, union=setting == UNION)
        for (engine, setting), preset in presets.items()
    }
    for step in (training.plain_step, *steps.values()):
        step()
        step()
    longest = max(preset.refresh_every_n_steps for preset in presets.values())
    for key, preset in presets.items():  # let every interval start with a refresh
        for _ in range(-2 % preset.refresh_every_n_steps):
            steps[key]()

    share = SHARE[name] / sum(SHARE[model] for model in args.models)
    ends, plain, ratios = time.perf_counter() + args.seconds * share, [], {key: [] for key in steps}
    while time.perf_counter() < ends or len(plain) < 3:
        spent = {key: 0.0 for key in steps}
        plain_spent = 0.0
        for place in range(longest):
            plain_spent += training.seconds(training.plain_step) / longest
            for key, step in steps.items():
                if place < presets[key].refresh_every_n_steps:
                    spent[key] += training.seconds(step)
        plain.append(plain_spent)
        for key, preset in presets.items():
            ratios[key].append(spent[key] / preset.refresh_every_n_steps / plain_spent - 1)
    overheads = {
        key: Overhead(*statistics.quantiles(values, n=4)) for key, values in ratios.items()
    }
    return {
        "plain_seconds": statistics.median(plain),
        "rounds": len(plain),
        "overhead": {
            engine: {setting: overheads[engine, setting]._asdict() for setting in SETTINGS}
            for engine in args.engines
        },
    }


def peak_bytes() -> int:
    """Return the most memory this process has held: on the GPU if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_peak(name: str, engine: str, args: argparse.Namespace) -> None:
    """Take steps of one kind and print the peak before and after them, in bytes.

    Args:
        name: As for `make_model`.
        engine: Name of an engine, or ``"plain"``.
        args: The command line.
    """
    training = Training(name, args)
    before = peak_bytes()
    step = training.plain_step
    if engine != "plain":
        step = training.make_refined_step(make_settings("robust", engine=engine))
    for _ in range(9):
        step()
    print(json.dumps({"before": before, "peak": peak_bytes()}))


def measure_memory(name: str, args: argparse.Namespace) -> dict:
    """Return peaks in bytes, each of a fresh process, by engine.

    Args:
        name: As for `make_model`.
        args: The command line.
    """
    peaks = {}
    for engine in ("plain", *args.engines):
        command = [sys.executable, __file__, "--peak", name, engine, "--stem", args.stem]
        command += ["--device", args.device, "--batch-size", str(args.batch_size)]
        command += ["--autocast", args.autocast] if args.autocast else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[engine] = json.loads(output.splitlines()[-1])
    return peaks


def format_table(results: dict, args: argparse.Namespace) -> str:
    """Return a Markdown table of everything measured.

    Args:
        results: By model, what `measure_time` and `measure_memory` return.
        args: The command line.
    """
    lines = [
        "| model | step | " + " | ".join(SETTINGS) + " | peak memory | beyond the start |",
        "|" + "---|" * (len(SETTINGS) + 4),
    ]
    for name, result in results.items():
        base = result.get("memory", {}).get("plain")
        grown = base and base["peak"] - base["before"]
        memory = f"{base['peak'] / 2**20:.0f} MB | {grown / 2**20:.0f} MB" if base else "|"
        milliseconds = f"plain, {1000 * result['plain_seconds']:.1f} ms"
        lines.append(f"| {name} | {milliseconds} |" + " |" * len(SETTINGS) + f" {memory} |")
        for engine in args.engines:
            cells = [
                f"{100 * cell['median']:+.0f} % ({100 * cell['lower']:.0f} to "
                f"{100 * cell['upper']:.0f})"
                for cell in result["overhead"][engine].values()
            ]
            if base:
                peak = result["memory"][engine]
                cells += [
                    f"x {peak['peak'] / base['peak']:.2f}",
                    f"x {(peak['peak'] - peak['before']) / grown:.2f}",
                ]
            else:
                cells += ["", ""]
            lines.append(f"| {name} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = [name for name in SHARE if name != LARGE]
    parser.add_argument("--models", nargs="+", choices=list(SHARE), default=small)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--stem", choices=("7x7", "3x3"), default="7x7", help="of the ResNet-18")
    parser.add_argument("--batch-size", type=int, default=128, help="rows")
    parser.add_argument("--seconds", type=float, default=200, help="for the rounds of all models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", choices=("float16", "bfloat16"), help="mixed precision")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak, args)
        return

    # Memory first: a child process starts with its parent's peak, which is small as yet.
    measured = [n for n in args.models if n.startswith("resnet") and not args.no_memory]
    memory = {name: {"memory": measure_memory(name, args)} for name in measured}
    results = {name: measure_time(name, args) | memory.get(name, {}) for name in args.models}
    print(
        f"Time of a training step over a plain one, {args.batch_size} rows, {args.device}, "
        f"{args.autocast or 'float32'}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}: median (quartiles) of "
        + ", ".join(f"{result['rounds']} rounds ({name})" for name, result in results.items())
        + f".\nThe paper's extra wall-clock of an epoch: {PAPER}.\n"
    )
    print(format_table(results, args))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
