"""The table of models that every engine meets, and references of Z = J t.

The references import nothing of the library; they take a copy of the model in double precision.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from helpers import models
from torch import Tensor, nn

ENGINES = ("finite_difference", "forward_mode", "head")


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and what may be expected of the engines.

    Attributes:
        make: Builds the model.
        shape: Of one row.
        tokens: Rows are token numbers instead of numbers.
        train: Mode of the training forward.
        rows: Batch size.
        engines: Engines that serve it.
        rounding: Largest relative error of an exact engine in float32.
        error: That of finite differences in float32.
        error64: That of finite differences in float64.
        large: Too many parameters and scores for one backward pass each.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    train: bool = True
    rows: int = 6
    engines: tuple[str, ...] = ENGINES
    rounding: float = 2e-6
    error: float = 2e-2
    error64: float = 1e-6
    large: bool = False

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        """Return the model and a batch of inputs."""
        torch.manual_seed(seed)
        model = self.make().train(self.train).to(dtype)
        shape = (self.rows, *self.shape)
        if self.tokens:
            return model, torch.randint(models.CLASSES, shape)
        return model, torch.randn(shape).to(dtype)


IMAGE = (2, 6, 6)
SEQUENCE = (5, 8)
PHOTO = (3, 32, 32)
NO_FORWARD_MODE = ("finite_difference", "head")
# The checkpointing of torch 2.4 goes through a custom function without forward mode.
OLD_CHECKPOINT = hasattr(torch.utils.checkpoint, "_NoopSaveInputs")
NO_HEAD = ("finite_difference", "forward_mode")  # see `test_head_of_tied_weights`
CASES = {
    "mlp": Case(models.make_mlp, (5,)),
    "cnn": Case(models.make_cnn, IMAGE),
    "cnn, batch norm, train": Case(lambda: models.make_cnn(nn.BatchNorm2d), IMAGE),
    "cnn, batch norm, eval": Case(lambda: models.make_cnn(nn.BatchNorm2d), IMAGE, train=False),
    "cnn, group norm": Case(lambda: models.make_cnn(nn.GroupNorm), IMAGE),
    "layer norm, dropout": Case(models.make_normalized_mlp, (5,)),
    # Batch statistics over 12 values in the last stage: badly conditioned, for every engine.
    "resnet18, train": Case(
        models.make_resnet18, PHOTO, rows=12, rounding=2e-5, error=0.1, error64=1e-5, large=True
    ),
    "resnet18, eval": Case(
        models.make_resnet18, PHOTO, rows=12, train=False, error=0.1, error64=1e-5, large=True
    ),
    "multi-head attention": Case(models.Attention, SEQUENCE),
    "scaled dot product": Case(models.ScaledDotProduct, SEQUENCE),
    "lstm": Case(models.Recurrent, SEQUENCE),
    "tied weights": Case(models.Tied, (3,), tokens=True, engines=NO_HEAD),
    "aliased head": Case(models.Aliased, (5,)),
    "checkpointing": Case(
        models.Checkpointed, (5,), engines=NO_FORWARD_MODE if OLD_CHECKPOINT else ENGINES
    ),
    "weight norm": Case(models.make_weight_norm, (5,)),
    # In training mode its power iteration writes in a tensor, which torch has no forward mode for.
    "spectral norm, train": Case(models.make_spectral_norm, (5,), engines=NO_FORWARD_MODE),
    "spectral norm, eval": Case(models.make_spectral_norm, (5,), train=False),
}


def random_direction(params: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Return a direction of norm 3, one tensor per parameter."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    norm = torch.stack([part.square().sum() for part in parts]).sum().sqrt()
    return [(3 * part / norm).to(p.dtype) for part, p in zip(parts, params, strict=True)]


def double_copy(model: nn.Module) -> nn.Module:
    """Return an independent copy in float64."""
    return copy.deepcopy(model).double()


def dense_tangent(scores: Tensor, params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """Return Z = J t, one backward pass for each score.

    Args:
        scores: Float64 scores with their graph, ``(batch, classes)``.
        params: Parameters they were computed with.
        direction: t, one tensor per parameter.
    """
    tangent = torch.zeros_like(scores)
    for place, score in enumerate(scores.reshape(-1)):
        parts = torch.autograd.grad(score, params, retain_graph=True, allow_unused=True)
        tangent.view(-1)[place] = sum(
            (part * along.double()).sum()
            for part, along in zip(parts, direction, strict=True)
            if part is not None
        )
    return tangent.detach()


def twice_backward_tangent(
    scores: Tensor, params: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor:
    """Return Z = J t as the derivative of the linear map v -> (J' v) . t, in two backward passes.

    Args:
        scores: As for `dense_tangent`.
        params: Likewise.
        direction: Likewise.
    """
    probe = torch.zeros_like(scores, requires_grad=True)
    parts = torch.autograd.grad(scores, params, probe, create_graph=True)
    along = [(part * t.double()).sum() for part, t in zip(parts, direction, strict=True)]
    return torch.autograd.grad(torch.stack(along).sum(), probe)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def argmax_agreement(found: Tensor, expected: Tensor) -> float:
    """Return the share of rows whose largest entry is the same class."""
    return (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
