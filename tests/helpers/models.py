"""Models that fit on a screen, one for each thing that an engine could stumble over."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

CLASSES = 4


def make_mlp(inputs: int = 5, hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def make_cnn(normalization: type[nn.Module] | None = None) -> nn.Sequential:
    """Return a network of two convolutions, with batch or group normalization or without."""
    layers: list[nn.Module] = []
    for before, after in ((2, 6), (6, 6)):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        if normalization is nn.BatchNorm2d:
            layers.append(nn.BatchNorm2d(after))
        if normalization is nn.GroupNorm:
            layers.append(nn.GroupNorm(2, after))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES))


def make_normalized_mlp() -> nn.Sequential:
    """Return a perceptron with layer normalization and dropout."""
    return nn.Sequential(
        nn.Linear(5, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Linear(16, CLASSES),
    )


def make_resnet18() -> nn.Module:
    return resnet18(num_classes=CLASSES)


class Attention(nn.Module):
    """`nn.MultiheadAttention` over a sequence, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed, _ = self.attention(inputs, inputs, inputs, need_weights=False)
        return self.head((inputs + mixed).mean(1))


class ScaledDotProduct(nn.Module):
    """`F.scaled_dot_product_attention`, which has fused kernels without forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.project(inputs).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value).squeeze(1).mean(1))


class Recurrent(nn.Module):
    """An LSTM, whose weights stand a second time in a flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs)[0][:, -1])


class Tied(nn.Module):
    """One matrix embeds the tokens and scores them."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens).mean(1))))


class Aliased(nn.Module):
    """A submodule that is reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"body": nn.Linear(5, 8), "fc": nn.Linear(8, CLASSES)})
        self.head = self.model["fc"]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.model["body"](inputs)))


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embed = nn.Linear(5, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        return self.head(checkpoint(self.block, hidden, use_reentrant=self.use_reentrant))


def make_weight_norm() -> nn.Sequential:
    return nn.Sequential(weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def make_spectral_norm() -> nn.Sequential:
    """Return a perceptron whose training forward also moves a power iteration along."""
    return nn.Sequential(spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


class Cube(torch.autograd.Function):
    """A custom function without forward mode."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 3 * inputs**2 * gradient


class Cubic(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Cube.apply(inputs)


class HalfPrecision(nn.Module):
    """A model that opens autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(torch.tanh(self.body(inputs))).float()


class Restless(nn.Module):
    """A forward that changes all the state it can reach.

    It draws from every random generator, keeps running statistics in place and by assignment, and
    fills a buffer that was empty. ``on_forward`` may raise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("seen", None)
        self.on_forward = lambda: None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.body(inputs))
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        self.seen = inputs.detach().clone()
        self.on_forward()
        hidden = hidden * (1 + random.random()) + np.random.rand()  # noqa: NPY002
        return self.head(self.dropout(hidden))
