"""Models, rows and the module of `step_time.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import torchvision
from step_rivals import RIVALS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch, SAflexMixin

CLASSES, TOKENS, WORDS = 8, 64, 5000
BATCHES = 8  # that come again and again


class Transformer(nn.Module):
    """A small encoder: 4 layers of width 128 on patches of images, or 2 on words."""

    def __init__(self, embed: nn.Module, places: int, layers: int) -> None:
        super().__init__()
        self.embed = embed
        self.place = nn.Parameter(0.02 * torch.randn(places, 128))
        layer = nn.TransformerEncoderLayer(
            128, 4, 512, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``."""
        return self.head(self.layers(self.embed(inputs) + self.place).mean(1))


class Patches(nn.Module):
    """Patches of 4 x 4 pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 128, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        return self.conv(images).flatten(2).mT


def perceptron(inputs: int, width: int, classes: int = CLASSES) -> nn.Module:
    """Return one with two hidden layers."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def vit_s() -> nn.Module:
    """Return ViT-S/16."""
    return torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536, num_classes=CLASSES)


class Case(NamedTuple):
    """A model, the shape of a row, the rows of a batch, classes, and validation rows."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int = 128
    classes: int = CLASSES
    val_rows: int = 512
    words: int = 0  # of which rows of text are made


CASES = {
    "qsar": Case(partial(perceptron, 41, 256), (41,)),
    "mlp": Case(partial(perceptron, 3 * 28 * 28, 1024), (3, 28, 28)),
    "text": Case(
        lambda: Transformer(nn.Embedding(WORDS, 128), TOKENS, 2), (TOKENS,), 32, words=WORDS
    ),
    "vit": Case(lambda: Transformer(Patches(), 49, 4), (3, 28, 28), 32),
    "resnet18": Case(lambda: torchvision.models.resnet18(num_classes=CLASSES), (3, 28, 28), 32),
    "resnet50": Case(lambda: torchvision.models.resnet50(num_classes=CLASSES), (3, 224, 224)),
    "vit_s": Case(vit_s, (3, 224, 224)),
}
LARGE = ("resnet50", "vit_s")  # measured on a GPU, or where they are named


class Cell(NamedTuple):
    """One line of the table."""

    model: str
    batch: str
    kind: str


def draw_rows(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """Return random inputs and labels."""
    draw = partial(torch.randint, case.words) if case.words else torch.randn
    return draw((number, *case.shape)), torch.randint(case.classes, (number,))


def draw_batches(case: Case, rows: int, *, union: bool) -> list[AugmentedBatch]:
    """Return batches of which the second half of the rows, or all, are augmented."""
    clean = rows // 2 if union else 0
    place = torch.arange(rows)
    augmented = place >= clean
    return [
        AugmentedBatch(
            *draw_rows(case, rows),
            augmented,
            augmented * (1 + place % 3),
            place + rows * number,
        )
        for number in range(BATCHES)
    ]


class Repeated:
    """A loader of the same batches again and again."""

    def __init__(self, batches: list[AugmentedBatch], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[AugmentedBatch]:
        return (self.batches[step % len(self.batches)] for step in range(self.steps))


class Net(SAflexMixin, pl.LightningModule):
    """A module that trains plainly, with SAFLEX, or by a rival's loss."""

    def __init__(self, cell: Cell, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        case = CASES[cell.model]
        self.net = case.make()
        self.num_indices = BATCHES * rows
        self.validation = draw_rows(case, case.val_rows)
        self.val_size = max(rows // 4, 1)
        self.make_rival = RIVALS.get(cell.kind)
        self.is_plain = False

    def forward(self, inputs):
        """Return logits."""
        return self.net(inputs)

    def saflex_group_names(self):
        """Name the groups."""
        return ("clean", "first", "second", "third")

    def saflex_dataloader(self):
        """Return the validation rows that steer."""
        return DataLoader(TensorDataset(*self.validation))

    def on_fit_start(self):
        """Make the rival, where the parameters are."""
        self.steering = [part.to(self.device) for part in self.validation]
        self.rival = self.make_rival and self.make_rival(self)

    def val_rows(self):
        """Return validation rows, for a rival."""
        rows = torch.randint(len(self.steering[0]), (self.val_size,)).to(self.device)
        return [part[rows] for part in self.steering]

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        if self.rival is None or self.is_plain:
            return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)
        return self.rival(batch)

    def configure_optimizers(self):
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)
