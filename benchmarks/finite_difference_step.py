"""Measure how far finite differences are from the exact tangent, by step and by damping.

    python benchmarks/finite_difference_step.py
    python benchmarks/finite_difference_step.py --data bloodmnist.npz --seeds 0 1

Six models train on BloodMNIST by Adam; after 1, 20 and 100 steps the tangent of a training batch
along the validation gradient is measured in float32 with several steps and compared with forward
mode in float64. All models stay in training mode. Errors are relative Frobenius norms after
centring over the batch; agreement is the share of rows whose largest entry is the same class.

A step is taken in the precision that products have by default, on a GPU with TF32 convolutions;
the engine computes both of its points without it. Forward mode has the default precision.
"""

import argparse
import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

import saflex_lightning.engines.tangent as tangent_module
from saflex_lightning.engines import (
    FiniteDifferenceEngine,
    ForwardModeEngine,
    Tangent,
    adam_second_moments,
    loss_gradient,
    make_tangent,
    select_parameters,
    unchanged_state,
)
from saflex_lightning.engines.parameters import moved_parameters

AGES = (1, 20, 100)
STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FORWARD_MODE = "forward mode"
RESPONSES = (1e-3, 3e-3, 1e-2)  # how far the scores move, root mean square
DAMPINGS = (0.01, 0.03, 0.1, 0.3)
ENGINE = "the engine"

Row = tuple[float, float]  # relative error, agreement


def make_mlp(dead: bool = False) -> nn.Module:
    """Return a perceptron; ``dead`` switches half and a quarter of the hidden units off."""
    hidden = [nn.Linear(2352, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    if dead:
        with torch.no_grad():
            hidden[0].bias[:128] -= 20
            hidden[2].bias[:64] -= 20
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 8))


def make_cnn(normalization: Callable[[int], nn.Module]) -> nn.Module:
    """Return two convolutions with biases, each before a normalization."""
    first = [nn.Conv2d(3, 32, 3, 2, 1), normalization(32), nn.ReLU()]
    second = [nn.Conv2d(32, 64, 3, 2, 1), normalization(64), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))


class SmallViT(nn.Module):
    """Vision transformer: 16 patches, width 64, 4 layers, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 7, 7)
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 8)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(batch, 8)``."""
        return self.head(self.layers(self.patches(images).flatten(2).mT).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": make_mlp,
    "MLP, dead units": lambda: make_mlp(dead=True),
    "CNN, batch norm": lambda: make_cnn(nn.BatchNorm2d),
    "CNN, group norm": lambda: make_cnn(lambda channels: nn.GroupNorm(8, channels)),
    "ViT": SmallViT,
    "ResNet-18": lambda: resnet18(num_classes=8),
}


def read_split(data: Path, split: str, device: str) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1], ``(rows, 3, 28, 28)``, and labels, ``(rows,)``."""
    with np.load(data) as file:
        images = torch.from_numpy(file[f"{split}_images"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file[f"{split}_labels"].ravel()).long()
    return images.float().div(127.5).sub(1).to(device), labels.to(device)


def make_tangents(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> dict[str, Tangent]:
    """Return the plain tangent of a validation batch, preconditioned ones, and a random one.

    The random one stands for directions that scarcely move the scores, where rounding tells.
    """
    params = select_parameters(model)
    gradient = loss_gradient(
        model,
        params,
        lambda: model(images),
        lambda scores: F.cross_entropy(scores, labels),
        engine="finite_difference",
    )
    tangents = {"plain": make_tangent(gradient)}
    moments = adam_second_moments(params, [optimizer])
    default = tangent_module._DAMPING
    for damping in DAMPINGS:
        tangent_module._DAMPING = damping
        tangents[f"damping {damping}"] = make_tangent(gradient, moments)
    tangent_module._DAMPING = default
    tangents["random"] = make_tangent([torch.randn_like(parameter) for parameter in params])
    return tangents


@torch.no_grad()
def compare(model: nn.Module, images: Tensor, tangent: Tangent) -> dict[str, Row]:
    """Return error and agreement of each way to choose the step.

    Args:
        model: The model, in training mode.
        images: A training batch.
        tangent: The direction.
    """
    one = torch.ones((), device=images.device)
    unit = Tangent(tuple(part.double() for part in tangent.direction), one.double())
    wide = copy.deepcopy(model).double()
    exact = ForwardModeEngine(wide, select_parameters(wide)).measure(
        lambda: wide(images.double()), unit
    )[1]
    exact -= exact.mean(0)
    response = exact.square().mean().sqrt().item()
    steps = {f"{step:g}": step for step in STEPS}
    steps |= {f"scores move by {wanted:g}": wanted / response for wanted in RESPONSES}
    params = select_parameters(model)
    with unchanged_state(model):
        here = model(images)
    tangents = {}
    for name, step in steps.items():
        moved = moved_parameters(params, tangent.direction, step)
        with unchanged_state(model), moved:
            tangents[name] = (model(images) - here) / step
    engine = FiniteDifferenceEngine(model, params)
    unit_norm = tangent._replace(norm=one)
    with unchanged_state(model):
        _, found = engine.measure(lambda: model(images), unit_norm)
        tangents[ENGINE] = found
        _, tangents[FORWARD_MODE] = ForwardModeEngine(model, params).measure(
            lambda: model(images), unit_norm
        )
    rows = {}
    for name, found in tangents.items():
        centred = found.double() - found.double().mean(0)
        agreement = (centred.argmax(1) == exact.argmax(1)).double().mean().item()
        rows[name] = (((centred - exact).norm() / exact.norm()).item(), agreement)
    return rows


def run(
    name: str, seed: int, batch_size: int, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]
) -> dict[tuple[str, str, int], Row]:
    """Train one model and return its rows by (tangent, step, age)."""
    torch.manual_seed(seed)
    model, generator = MODELS[name]().to(train[0].device), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = {}

    def draw(split: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(split[0]), (size,), generator=generator).to(split[0].device)
        return split[0][chosen], split[1][chosen]

    for age in range(1, max(AGES) + 1):
        images, labels = draw(train, 128)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if age in AGES:
            tangents = make_tangents(model, optimizer, *draw(val, 128))
            images, _ = draw(train, batch_size)
            for kind, tangent in tangents.items():
                for step, row in compare(model, images, tangent).items():
                    rows[kind, step, age] = row
    return rows


def summary(rows: Sequence[Row]) -> str:
    """Return the cells median and worst error, median and worst agreement."""
    errors, agreements = zip(*rows, strict=True)
    return (
        f" {100 * statistics.median(errors):.1f} % | {100 * max(errors):.0f} % "
        f"| {statistics.median(agreements):.3f} | {min(agreements):.2f} |"
    )


def main() -> None:
    """Measure and print three Markdown tables."""
    shipped = resources.files("saflex_lightning") / "recipes/assets/bloodmnist_subset.npz"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a bloodmnist.npz; default: the shipped subset")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch-size", type=int, default=64, help="rows whose tangent is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with resources.as_file(shipped) as default:
        file = args.data or default
        train, val = (read_split(file, split, args.device) for split in ("train", "val"))

    print(f"{args.device}, torch {torch.__version__}")
    by_step, by_damping, by_model = defaultdict(list), defaultdict(list), defaultdict(list)
    for name in args.models:
        for seed in args.seeds:
            for (kind, step, _), row in run(name, seed, args.batch_size, train, val).items():
                tangent = "preconditioned" if kind.startswith("damping") else kind
                is_default = kind in {"plain", "random", f"damping {tangent_module._DAMPING}"}
                if is_default:
                    by_step[tangent, step].append(row)
                if step == ENGINE and kind != "random":
                    by_damping[kind].append(row)
                if step in {ENGINE, FORWARD_MODE} and is_default:
                    by_model[name, f"{tangent}, {step}"].append(row)

    columns = " median error | worst | median agreement | worst |\n" + "|---" * 5 + "|"
    print(f"\nBy step, for a direction of norm 1:\n\n| tangent, step |{columns}")
    for (tangent, step), rows in sorted(by_step.items(), key=lambda item: item[0][0]):
        print(f"| {tangent}, {step} |{summary(rows)}")
    print(f"\nBy damping, as the engine does it:\n\n| tangent |{columns}")
    for kind, rows in by_damping.items():
        print(f"| {kind} |{summary(rows)}")
    print(f"\nBy model, as the two engines do it:\n\n| model, tangent |{columns}")
    for (name, tangent), rows in by_model.items():
        print(f"| {name}, {tangent} |{summary(rows)}")


if __name__ == "__main__":
    main()
