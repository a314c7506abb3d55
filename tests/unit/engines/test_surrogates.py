"""Layers whose backward pass is not their derivative: finite differences name them, and no others.

A difference of values sees what a layer does, a gradient what it says it does. Where they differ, a
direction made from the one says nothing about the other.
"""

import pytest
import torch
from helpers.cases import CASES, random_direction
from helpers.heads import HEADS
from helpers.models import CLASSES, Cubic, Recurrent, make_resnet18
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from saflex_lightning.engines import UnsupportedModelError, descent_direction, make_engine

INPUTS = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5)


class Binarised(nn.Linear):
    """Weights of -1 and 1, whose gradient goes straight through the sign."""

    def forward(self, inputs: Tensor) -> Tensor:
        binary = self.weight + (self.weight.sign() - self.weight).detach()
        return nn.functional.linear(inputs, binary, self.bias)


class FakeInt4(nn.Linear):
    """Weights on a grid of 16 values, likewise."""

    def forward(self, inputs: Tensor) -> Tensor:
        scale = self.weight.detach().abs().max() / 7
        grid = scale * (self.weight / scale).round().clamp(-8, 7)
        return nn.functional.linear(inputs, self.weight + (grid - self.weight).detach(), self.bias)


class StraightThroughActivations(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + (inputs.sign() - inputs).detach()


class Reverse(torch.autograd.Function):
    """Gradient reversal, as in domain-adversarial training."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class Reversed(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Reverse.apply(inputs)


class Clipped(torch.autograd.Function):
    """A gradient that is clipped on its way."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 0.1 * gradient


class Scaled(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Clipped.apply(inputs)


class Stopped(nn.Module):
    """No gradient along one of two ways, or along both."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: Tensor) -> Tensor:
        return self.share * inputs.detach() + (1 - self.share) * inputs


def between(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *middle, nn.Linear(8, CLASSES))


def look(model: nn.Module, inputs: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Use the engine once."""
    engine = make_engine("finite_difference", model.to(dtype))
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    engine.jvp(lambda: model(inputs), descent_direction(random_direction(engine.params)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: between(Binarised(8, 8)), "2"),
        (lambda: between(FakeInt4(8, 8), nn.Tanh(), nn.Linear(8, 8)), "2"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Binarised(8, CLASSES)), "2"),
        # Between layers, it is the last one before it whose parameters tell.
        (lambda: between(nn.Linear(8, 8), Reversed()), "2"),
        (lambda: between(Reversed(), nn.Linear(8, 8)), "0"),
        (lambda: between(Scaled()), "0"),
        (lambda: between(Stopped(0.5)), "0"),
        (lambda: between(nn.BatchNorm1d(8), StraightThroughActivations()), "2"),
    ],
    ids=[
        "binarised",
        "int4",
        "binarised head",
        "reversal",
        "reversal after the first layer",
        "scaled gradient",
        "gradient that is stopped half",
        "straight-through activations",
    ],
)
def test_what_has_another_backward_pass_is_named(make, named, dtype):
    torch.manual_seed(0)
    match = f"submodule `{named}` it is not(.|\n)*Pass engine='forward_mode' or engine='head'"
    with pytest.raises(UnsupportedModelError, match=match):
        look(make(), torch.randn(16, 5), dtype)


def test_torch_s_own_fake_quantisation_is_named():
    class PerChannel(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            scale = self.weight.detach().abs().amax(1) / 7
            zeros = torch.zeros_like(scale, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zeros, 0, -8, 7)
            return nn.functional.linear(inputs, weight, self.bias)

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="submodule `2` it is not"):
        look(between(PerChannel(8, 8)), torch.randn(16, 5))


def test_a_nested_surrogate_is_named_among_more_layers_than_are_looked_at_one_by_one():
    torch.manual_seed(0)
    layers = [part for _ in range(30) for part in (nn.Linear(8, 8), nn.Tanh())]
    for place in range(20, 40, 2):
        layers[place] = nn.Sequential(nn.Dropout(0.1), nn.Sequential(Binarised(8, 8)))
    model = nn.ModuleDict({"stem": nn.Linear(5, 8), "deep": nn.Sequential(*layers)})
    model["head"] = nn.Linear(8, CLASSES)

    def run() -> Tensor:
        return model["head"](model["deep"](model["stem"](INPUTS)))

    engine = make_engine("finite_difference", model.double())
    with pytest.raises(UnsupportedModelError, match=r"submodule `deep\.[23]\d\.1\.0` it is not"):
        engine.jvp(run, descent_direction(random_direction(engine.params)))


def test_surrogates_that_do_not_move_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(Binarised(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False)
    look(model, INPUTS)
    model = between(Reversed())
    model[0].requires_grad_(False)
    look(model, INPUTS)
    look(between(Stopped(1.0)), INPUTS)  # what is behind it never moves either


# Healthy models


def make_convolutions_with_a_bias_before_batch_norm() -> nn.Sequential:
    """Return one that has parameters without any derivative."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def make_vit() -> VisionTransformer:
    vit = VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1, num_classes=CLASSES)
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    return vit


def make_dead() -> nn.Sequential:
    """Return a network half of whose units never fire."""
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        model[0].bias[:8] = -100.0
    return model


def make_spread(size: float) -> nn.Sequential:
    """Return a network with very large or very small scores."""
    model = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, CLASSES))
    with torch.no_grad():
        model[-1].weight *= size
        model[-1].bias *= size
    return model


PHOTOS, ROWS, SEQUENCES = (12, 3, 32, 32), (16, 5), (8, 5, 8)
HEALTHY = {
    "resnet18": (make_resnet18, PHOTOS),
    "vision transformer": (make_vit, PHOTOS),
    "lstm": (Recurrent, SEQUENCES),
    "bias before batch norm": (make_convolutions_with_a_bias_before_batch_norm, PHOTOS),
    "dead units": (make_dead, ROWS),
    "large scores": (lambda: make_spread(1e4), ROWS),
    "small scores": (lambda: make_spread(1e-4), ROWS),
    "custom function": (lambda: between(Cubic()), ROWS),
    "saturated": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Softsign(), between()), ROWS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "resnet18" else ()) for n in HEALTHY],
)
def test_healthy_models_are_served(name, train, dtype):
    make, shape = HEALTHY[name]
    for seed in range(1 if name == "resnet18" else 3):
        torch.manual_seed(seed)
        inputs = torch.randn(shape)
        model = make()
        model(inputs)  # gives a lazy layer its size, and running statistics
        look(model.train(train), inputs, dtype)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.large])
def test_no_model_of_the_table_has_another_backward_pass(name):
    look(*CASES[name].build())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in HEADS if name != "resnet18"])
def test_no_way_to_make_scores_has_another_backward_pass(name):
    model, inputs = HEADS[name].build()
    look(model, inputs, torch.float64)


def test_a_layer_that_starts_at_zero_is_served():
    torch.manual_seed(0)
    model = between(nn.Linear(8, 8))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    look(model, INPUTS)


def test_a_model_is_served_after_training():
    torch.manual_seed(0)
    model, inputs = make_convolutions_with_a_bias_before_batch_norm(), torch.randn(PHOTOS)
    model(inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(12) % CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    look(model, inputs)
