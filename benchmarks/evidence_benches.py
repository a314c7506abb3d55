"""Benches of `evidence.py` in three kinds, named before anything was measured.

*natural*: operations that people use; *harmful*: operations and generators some of which destroy
what the label says; *wrong labels*: pools and training sets whose labels are partly wrong. A batch
is a union of clean and augmented rows, or, where the name ends in ``alone``, augmented rows only.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from saflex_lightning import AugmentedBatch
from saflex_lightning.data import TagOperations
from saflex_lightning.recipes.label_noise import plant_wrong_labels
from saflex_lightning.recipes.tabular.npz_file import read_npz
from saflex_lightning.recipes.tabular.table import drop_duplicates

__all__ = ["BENCHES", "KINDS", "Batches", "Bench", "Data", "Pool", "make_data"]

KINDS = ("natural", "harmful", "wrong labels")
VERSIONS = 12  # augmented versions of a row that are made beforehand
TABLES = {
    "letter": "standin_letter",
    "qsar": "qsar",
    "shrutime": "shrutime",
    "kdd": "appetency_kdd99_10pct",
}
MOST_LEVELS = 100  # of a categorical column that is read
FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Bench:
    """What is trained on what: see `make_data`."""

    kind: str
    source: str  # blood, fashion, digits, or a table: letter, qsar, shrutime, kdd
    network: str  # cnn, resnet18 or mlp
    rows: tuple[int, int, int]  # clean, validation and pool rows of each class
    steps: int
    made: str  # what makes the augmented rows
    alone: bool = False
    batch: int = 64  # clean rows of a union batch
    annealed: bool = False  # whether the learning rate falls to 0, along a cosine


BENCHES = {
    "blood randaugment": Bench("natural", "blood", "cnn", (50, 25, 0), 300, "randaugment"),
    "blood crop": Bench("natural", "blood", "cnn", (50, 25, 0), 300, "crop"),
    "blood mixup": Bench("natural", "blood", "cnn", (50, 25, 0), 300, "mixup"),
    "fashion randaugment": Bench("natural", "fashion", "cnn", (50, 25, 0), 300, "randaugment"),
    "letter cutmix": Bench("natural", "letter", "mlp", (100, 25, 0), 1200, "cutmix", batch=128),
    "shrutime cutmix": Bench("natural", "shrutime", "mlp", (200, 50, 0), 600, "cutmix"),
    "kdd cutmix": Bench("natural", "kdd", "mlp", (100, 25, 0), 600, "cutmix"),
    "blood randaugment alone": Bench(
        "natural", "blood", "cnn", (50, 25, 0), 300, "randaugment", alone=True
    ),
    "blood crop alone": Bench("natural", "blood", "cnn", (50, 25, 0), 300, "crop", alone=True),
    "blood resnet18 randaugment": Bench(
        "natural", "blood", "resnet18", (150, 50, 0), 400, "randaugment"
    ),
    "blood resnet18 annealed": Bench(
        "natural", "blood", "resnet18", (150, 50, 0), 400, "randaugment", annealed=True
    ),
    "blood resnet18 annealed alone": Bench(
        "natural",
        "blood",
        "resnet18",
        (150, 50, 0),
        400,
        "randaugment",
        alone=True,
        annealed=True,
    ),
    "blood long": Bench("natural", "blood", "cnn", (400, 100, 0), 2500, "randaugment"),
    "blood long annealed": Bench(
        "natural", "blood", "cnn", (400, 100, 0), 2500, "randaugment", annealed=True
    ),
    "blood operations": Bench("harmful", "blood", "cnn", (50, 25, 0), 300, "operations"),
    "fashion operations": Bench("harmful", "fashion", "cnn", (50, 25, 0), 300, "operations"),
    "blood generators": Bench("harmful", "blood", "cnn", (25, 25, 200), 400, "generators"),
    "letter generators": Bench(
        "harmful", "letter", "mlp", (20, 20, 200), 800, "generators", batch=128
    ),
    "digits symmetric": Bench("wrong labels", "digits", "mlp", (6, 14, 80), 400, "symmetric"),
    "letter symmetric": Bench(
        "wrong labels", "letter", "mlp", (20, 20, 200), 800, "symmetric", batch=128
    ),
    "letter pseudo": Bench(
        "wrong labels", "letter", "mlp", (20, 20, 200), 800, "pseudo", batch=128
    ),
    "blood symmetric": Bench("wrong labels", "blood", "cnn", (25, 25, 200), 400, "symmetric"),
    "blood classwise": Bench("wrong labels", "blood", "cnn", (25, 25, 200), 400, "classwise"),
    "blood pseudo": Bench("wrong labels", "blood", "cnn", (25, 25, 200), 400, "pseudo"),
    "fashion symmetric": Bench("wrong labels", "fashion", "cnn", (25, 25, 200), 400, "symmetric"),
    "fashion classwise": Bench("wrong labels", "fashion", "cnn", (25, 25, 200), 400, "classwise"),
    "qsar classwise": Bench("wrong labels", "qsar", "mlp", (20, 20, 200), 400, "classwise"),
    "shrutime classwise": Bench("wrong labels", "shrutime", "mlp", (50, 50, 800), 400, "classwise"),
    "kdd classwise": Bench("wrong labels", "kdd", "mlp", (20, 20, 400), 400, "classwise"),
    "blood alone": Bench(
        "wrong labels", "blood", "cnn", (2, 10, 200), 400, "symmetric", alone=True
    ),
    "letter alone": Bench(
        "wrong labels", "letter", "mlp", (2, 10, 200), 800, "symmetric", alone=True, batch=128
    ),
    "fashion alone": Bench(
        "wrong labels", "fashion", "cnn", (2, 10, 200), 400, "symmetric", alone=True
    ),
    "blood resnet18 symmetric": Bench(
        "wrong labels", "blood", "resnet18", (25, 25, 200), 500, "symmetric", annealed=True
    ),
}
NOISE = {"symmetric": 0.4, "classwise": 0.3}
OPERATIONS = ("clean", "flip", "rotate", "shuffle", "noise", "swap", "paste")
GENERATORS = ("clean", "good", "mislabelled", "useless")


@dataclass
class Data:
    """The rows of one bench and seed; of images in [-1, 1].

    Attributes:
        clean: Inputs and labels.
        validation: Inputs and labels.
        test: Inputs and labels.
        names: Of the groups.
        make: From clean rows' numbers and a generator to augmented inputs, labels, groups, indices.
        wrong: Which indices a method that knows better would leave out; None where it is none.
    """

    clean: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    names: tuple[str, ...]
    make: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor, Tensor]]
    wrong: Tensor | None
    network: Callable[[], nn.Module]
    has_source: bool


@dataclass
class Pool:
    """The augmented rows of a fixed pool: see `Data.make`.

    With weights, beside clean rows of weight 1, rows are drawn by weight, and fewer of them where
    they weigh less on the mean.
    """

    inputs: Tensor
    labels: Tensor
    group: Tensor
    weights: Tensor | None = None

    def __call__(self, rows: Tensor, draws: torch.Generator) -> tuple[Tensor, ...]:
        """Draw as many rows as there are clean ones, or fewer."""
        size = len(rows)
        if self.weights is None:
            picked = torch.randint(0, len(self.labels), (size,), generator=draws)
        else:
            size = round(size * min(self.weights.mean().item(), 1))
            picked = torch.multinomial(self.weights, max(size, 1), True, generator=draws)
        return self.inputs[picked], self.labels[picked], self.group[picked], picked


class Batches(Dataset):
    """The training batches of a bench, one per step; a function of the seed alone."""

    def __init__(self, data: Data, bench: Bench, seed: int, method: str) -> None:
        self.data, self.bench, self.seed, self.method = data, bench, seed, method
        self.order = torch.Generator().manual_seed(seed + 17)
        rows, need = len(data.clean[1]), bench.steps * bench.batch
        passes = [torch.randperm(rows, generator=self.order) for _ in range(need // rows + 1)]
        self.rows = torch.cat(passes)[:need].view(bench.steps, bench.batch)

    def __len__(self) -> int:
        return self.bench.steps

    def __getitem__(self, step: int) -> AugmentedBatch:
        data, rows = self.data, self.rows[step]
        inputs, target = data.clean[0][rows], data.clean[1][rows]
        none, size = torch.zeros(len(rows), dtype=torch.long), len(data.clean[1])
        if self.method == "no augmentation":
            return AugmentedBatch(inputs, target, none > 0, none, rows)
        draws = torch.Generator().manual_seed(self.seed * 100_003 + step)
        made, labels, group, index = data.make(rows, draws)
        kept = torch.ones_like(index, dtype=torch.bool)
        if self.method == "oracle" and data.wrong is not None:
            kept = ~data.wrong[index]
        made, labels, group, index = made[kept], labels[kept], group[kept], index[kept]
        if self.bench.alone:
            return AugmentedBatch(made, labels, index >= 0, group, index)
        if labels.ndim == 2:
            target = F.one_hot(target, labels.shape[1]).float()
        return AugmentedBatch(
            torch.cat([inputs, made]),
            torch.cat([target, labels]),
            torch.cat([rows < 0, index >= 0]),
            torch.cat([none, group]),
            torch.cat([rows, index + size]),
        )


@cache
def read(source: str, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and labels of ``"train"``, and of ``"test"`` where the set has a split."""
    if source == "blood":
        file = np.load(folder / "medmnist" / "bloodmnist.npz")
        return {
            part: (
                torch.from_numpy(file[f"{part}_images"]).permute(0, 3, 1, 2).contiguous(),
                torch.from_numpy(file[f"{part}_labels"].ravel()).long(),
            )
            for part in ("train", "test")
        }
    if source == "fashion":
        sets = {part: _fashion(folder, part) for part in ("train", "test")}
        return {part: (x.unsqueeze(1), y.long()) for part, (x, y) in sets.items()}
    if source == "digits":
        x, y = load_digits(return_X_y=True)
        return {"train": (torch.tensor(x).float() / 16, torch.tensor(y).long())}
    return {"train": _table(folder / "tabular" / f"{TABLES[source]}.npz")}


def _table(file: Path) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a table, scaled; a column for each level of a few."""
    table = drop_duplicates(read_npz(file))
    few = [codes for codes in table.categorical.T if codes.max() < MOST_LEVELS]
    columns = [table.numeric, *(np.eye(codes.max() + 1)[codes] for codes in few)]
    x = torch.from_numpy(np.column_stack(columns)).float()
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6), torch.from_numpy(table.target)


def _fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    root = FASHION if FASHION.is_dir() else folder / "fashion"
    name = {"train": "train", "test": "t10k"}[part]
    pixels = gzip.decompress((root / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((root / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 28, 28)
    return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8)


def scale(images: Tensor) -> Tensor:
    """Return pixels in [-1, 1]; tables as they are."""
    return images.float().div(127.5).sub(1) if images.dtype == torch.uint8 else images


def make_network(name: str, shape: torch.Size, classes: int) -> nn.Module:
    """Return a fresh network whose last layer is linear."""
    if name == "mlp":
        width = 256
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(shape.numel(), width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, classes),
        )
    if name == "resnet18":
        return resnet18(num_classes=classes)
    layers: list[nn.Module] = []
    channels = shape[0]
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def make_data(bench: Bench, seed: int, folder: Path) -> Data:
    """Return the rows of a bench; which ones, and what is done to them, follows the seed."""
    sets = read(bench.source, folder)
    x, y = sets["train"]
    classes, generator = int(y.max()) + 1, torch.Generator().manual_seed(seed)
    of_class = [(y == label).nonzero().ravel() for label in range(classes)]
    mixed = [rows[torch.randperm(len(rows), generator=generator)] for rows in of_class]
    parts, start = [], 0
    for count in bench.rows:
        parts.append(torch.cat([rows[start : start + count] for rows in mixed]))
        start += count
    clean, val, pool = parts
    if "test" in sets:
        test = sets["test"]
    else:
        used = torch.zeros(len(y), dtype=torch.bool)
        used[torch.cat(parts)] = True
        test = x[~used], y[~used]

    def network() -> nn.Module:
        return make_network(bench.network, x.shape[1:], classes)

    def rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
        return scale(x[numbers]), y[numbers]

    make, names, wrong = (
        _pool(bench, seed, rows(clean), rows(pool), classes, network, generator)
        if len(pool)
        else _operations(bench, seed, x[clean], y[clean], classes)
    )
    return Data(
        rows(clean),
        rows(val),
        (scale(test[0]), test[1]),
        names,
        make,
        wrong,
        network,
        has_source=not len(pool),
    )


def _pool(bench, seed, clean, pool, classes, network, generator):
    """Rows of a fixed pool, some of which are wrong."""
    inputs, truth = pool
    if bench.made == "generators":
        group = torch.randint(1, 4, truth.shape, generator=generator)
        wrong_label = plant_wrong_labels(truth, classes, 0.8, generator)
        labels = torch.where(group == 2, wrong_label, truth)
        useless = (group == 3).nonzero().ravel()
        inputs = inputs.clone()
        inputs[useless] = inputs[useless[torch.randperm(len(useless), generator=generator)]]
        names, wrong = GENERATORS, (group == 3) | (labels != truth)
    else:
        group, names = torch.ones_like(truth), ("clean", "pool")
        if bench.made == "pseudo":
            labels = _pseudo_labels(network, clean, inputs, seed)
        elif bench.made == "classwise":
            turned = torch.rand(len(truth), generator=generator) < NOISE["classwise"]
            labels = torch.where(turned, (truth + 1) % classes, truth)
        else:
            labels = plant_wrong_labels(truth, classes, NOISE[bench.made], generator)
        wrong = labels != truth

    return Pool(inputs, labels, group), names, wrong


def _pseudo_labels(network, clean, inputs, seed):
    """Labels of a weak model of the clean rows."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        rows = torch.randint(0, len(clean[1]), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(clean[0][rows]), clean[1][rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in inputs.split(500)])


def _operations(bench, seed, images, labels, classes):
    """New versions of the clean rows."""
    if bench.made in {"mixup", "cutmix"}:
        return _mixed(bench, scale(images), labels, classes)
    versions, groups, names = _versions(bench, seed, images)

    def make(rows, draws):
        pick = torch.randint(0, VERSIONS, (len(rows),), generator=draws)
        return scale(versions[rows, pick]), labels[rows], groups[rows, pick], rows

    return make, names, None


def _mixed(bench, inputs, labels, classes):
    names = ("clean", *(f"{bench.made}_{strength}" for strength in range(4)))

    def make(rows, draws):
        others = rows[torch.randperm(len(rows), generator=draws)]
        if bench.made == "cutmix":  # of cells, the label is kept, as SAINT has it
            changed = torch.rand(inputs[rows].shape, generator=draws) < 0.1
            strength = (changed.float().mean(1) / 0.25 * 4).long().clamp(max=3)
            return (
                torch.where(changed, inputs[others], inputs[rows]),
                labels[rows],
                1 + strength,
                rows,
            )
        share = torch.rand(len(rows), generator=draws) / 2
        wide = share.view(-1, *[1] * (inputs.ndim - 1))
        target = F.one_hot(labels, classes).float()
        target = torch.lerp(target[rows], target[others], share.unsqueeze(1))
        made = torch.lerp(inputs[rows], inputs[others], wide)
        return made, target, 1 + (share * 8).long().clamp(max=3), rows

    return make, names, None


def _versions(bench, seed, images):
    generator = torch.Generator().manual_seed(seed)
    if bench.made == "randaugment":
        operations = TagOperations(v2.RandAugment(num_ops=2, magnitude=9))
        torch.manual_seed(seed + 1000)
        made = [[operations(image) for _ in range(VERSIONS)] for image in images]
        groups = torch.tensor([[one.group for one in row] for row in made])
        stacked = torch.stack([torch.stack([one.image for one in row]) for row in made])
        return stacked, groups, operations.group_names
    versions = []
    groups = torch.ones(len(images), VERSIONS, dtype=torch.long)
    if bench.made == "operations":
        groups = torch.randint(1, len(OPERATIONS), groups.shape, generator=generator)
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="reflect").to(torch.uint8)
    for number in range(VERSIONS):
        others = images[torch.randperm(len(images), generator=generator)]
        row = []
        for place, image in enumerate(images):
            if bench.made == "crop":
                top, left, flip = torch.randint(0, 7, (3,), generator=generator).tolist()
                view = padded[place, :, top : top + 28, left : left + 28]
                row.append(view.flip(-1) if flip > 3 else view)
            else:
                operation = OPERATIONS[groups[place, number]]
                row.append(_operate(operation, image, others[place], generator))
        versions.append(torch.stack(row))
    names = OPERATIONS if bench.made == "operations" else ("clean", bench.made)
    return torch.stack(versions, 1), groups, names


def _operate(operation: str, image: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Half of these keep what the label says, the others destroy it."""
    channels = image.shape[0]
    if operation == "flip":
        return image.flip(-1)
    if operation == "rotate":
        return torch.rot90(image, 2, (1, 2)) if channels == 3 else image
    if operation == "noise":
        noise = 40 * torch.randn(image.shape, generator=generator)
        return (image.float() + noise).clamp(0, 255).to(torch.uint8)
    if operation == "shuffle":
        order = torch.randperm(16, generator=generator)
        tiles = image.reshape(channels, 4, 7, 4, 7).permute(1, 3, 0, 2, 4).reshape(16, -1)[order]
        return tiles.reshape(4, 4, channels, 7, 7).permute(2, 0, 3, 1, 4).reshape(image.shape)
    if operation == "paste":
        return torch.cat([image[..., :14], other[..., 14:]], -1)
    return other
