"""Models that make their scores in different ways, and what ``engine="auto"`` chooses for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers.models import CLASSES, Tied, make_mlp, make_resnet18
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import VisionTransformer

WIDTH = 8


class Model(nn.Module):
    """A body, other parts by name, and a function of all of them and the inputs."""

    def __init__(self, score: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh())
        for name, part in parts.items():
            setattr(self, name, part)
        self.score = score

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.score(self, inputs)


class Cosine(nn.Module):
    """Cosine similarities with one prototype per class, on a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features) @ F.normalize(self.weight).T


class LoRAAround(nn.Module):
    """A frozen layer, and a matrix of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.base(features) + features @ self.A.T @ self.B.T


class LoRAInside(nn.Linear):
    """The same as a kind of linear layer; at first it does what that does, for B is 0."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) + features @ self.A.T @ self.B.T


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, CLASSES)


def on_body(head: nn.Module) -> Model:
    return Model(lambda self, inputs: self.head(self.body(inputs)), head=head)


def make_vit() -> VisionTransformer:
    """Return one whose class token is as wide as there are classes."""
    vit = VisionTransformer(32, 16, 1, 2, hidden_dim=CLASSES, mlp_dim=6, num_classes=CLASSES)
    nn.init.normal_(vit.heads.head.weight)
    return vit


def make_frozen_vit() -> VisionTransformer:
    vit = make_vit()
    vit.heads.requires_grad_(False)
    return vit


def make_scaled(scale: Callable[[nn.Module, Tensor], Tensor]) -> Model:
    """Return a model whose logits have a learned factor, which starts at 1."""
    return Model(
        lambda self, inputs: scale(self, self.head(self.body(inputs))),
        head=linear(),
        scale=nn.Parameter(torch.ones(())),
    )


def make_pooled_convolution() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3),
        nn.ReLU(),
        nn.Conv2d(WIDTH, CLASSES, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@dataclass(frozen=True)
class Head:
    """A model, what is chosen for it, and the shape of a row of its inputs."""

    make: Callable[[], nn.Module]
    engine: str
    params: Sequence[str]
    shape: tuple[int, ...] = (5,)
    tokens: bool = False

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the model in double precision, and a batch."""
        torch.manual_seed(0)
        model, shape = self.make().double(), (6, *self.shape)
        if self.tokens:
            return model, torch.randint(CLASSES, shape)
        return model, torch.randn(shape, dtype=torch.float64)


PHOTO = (3, 32, 32)
HEAD = ["head.weight", "head.bias"]
TWO_HEADS = ["one.weight", "one.bias", "two.weight", "two.bias"]
HEADS = {
    "perceptron": Head(make_mlp, "head", ["2.weight", "2.bias"]),
    "resnet18": Head(make_resnet18, "head", ["fc.weight", "fc.bias"], PHOTO),
    "vision transformer": Head(make_vit, "head", ["heads.head.weight", "heads.head.bias"], PHOTO),
    "cast": Head(
        lambda: Model(lambda self, x: self.head(self.body(x)).float(), head=linear()),
        "head",
        HEAD,
    ),
    "cloned": Head(
        lambda: Model(lambda self, x: self.head(self.body(x)).clone(), head=linear()),
        "head",
        HEAD,
    ),
    "called twice": Head(
        lambda: Model(
            lambda self, x: (self.head(self.body(x) + 1), self.head(self.body(x)))[1],
            head=linear(),
        ),
        "head",
        HEAD,
    ),
    "another layer after": Head(
        lambda: Model(
            lambda self, x: (self.head(self.body(x)), self.aside(self.body(x)))[0],
            head=linear(),
            aside=linear(),
        ),
        "head",
        HEAD,
    ),
    "tied": Head(Tied, "head", ["embed.weight"], (3,), tokens=True),
    # The others have a layer that makes the scores, but not as their last linear one.
    "pooled convolution": Head(
        make_pooled_convolution, "forward_mode", ["2.weight", "2.bias"], PHOTO
    ),
    "cosine": Head(lambda: on_body(Cosine()), "forward_mode", ["head.weight", "head.scale"]),
    "factor 1": Head(
        lambda: make_scaled(lambda self, scores: self.scale * scores), "forward_mode", HEAD
    ),
    "log-probabilities": Head(
        lambda: nn.Sequential(on_body(linear()), nn.LogSoftmax(-1)),
        "forward_mode",
        ["0.head.weight", "0.head.bias"],
    ),
    "weight norm": Head(
        lambda: on_body(weight_norm(linear())),
        "forward_mode",
        [
            "head.bias",
            "head.parametrizations.weight.original0",
            "head.parametrizations.weight.original1",
        ],
    ),
    "old weight norm": Head(
        lambda: on_body(nn.utils.weight_norm(linear())),
        "forward_mode",
        ["head.bias", "head.weight_g", "head.weight_v"],
    ),
    "frozen": Head(
        lambda: on_body(linear().requires_grad_(False)),
        "forward_mode",
        ["body.0.weight", "body.0.bias"],
    ),
    "frozen vision transformer head": Head(
        make_frozen_vit,
        "forward_mode",
        [f"encoder.layers.encoder_layer_0.mlp.3.{name}" for name in ("weight", "bias")],
        PHOTO,
    ),
    "bilinear": Head(
        lambda: Model(
            lambda self, x: self.head(self.body(x), self.body(x)),
            head=nn.Bilinear(WIDTH, WIDTH, CLASSES),
        ),
        "forward_mode",
        HEAD,
    ),
    "LoRA around": Head(
        lambda: on_body(LoRAAround(linear())), "forward_mode", ["head.A", "head.B"]
    ),
    "LoRA inside": Head(
        lambda: on_body(LoRAInside(WIDTH, CLASSES)), "forward_mode", ["head.A", "head.B"]
    ),
    "LoRA of layers": Head(  # the last of them makes one score per class
        lambda: Model(
            lambda self, x: self.base(self.body(x)) + self.B(self.A(self.body(x))),
            base=linear().requires_grad_(False),
            A=nn.Linear(WIDTH, 2),
            B=nn.Linear(2, CLASSES),
        ),
        "forward_mode",
        ["B.weight", "B.bias"],
    ),
    "pooled tokens": Head(
        lambda: Model(lambda self, x: self.head(self.body(x)).mean(1), head=linear()),
        "forward_mode",
        HEAD,
        (3, 5),
    ),
    "averaged heads": Head(
        lambda: Model(
            lambda self, x: (self.one(self.body(x)) + self.two(self.body(x))) / 2,
            one=linear(),
            two=linear(),
        ),
        "forward_mode",
        ["two.weight", "two.bias"],
    ),
    "tuple": Head(
        lambda: Model(
            lambda self, x: (self.one(self.body(x)), self.two(self.body(x))),
            one=linear(),
            two=linear(),
        ),
        "forward_mode",
        ["body.0.weight", "body.0.bias", *TWO_HEADS],
    ),
}
