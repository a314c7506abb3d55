"""Rivals of `evidence.py` that learn weights by a look one step ahead, with a double backward.

Clean rows count in full in both; the weights of the augmented rows are learned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from saflex_lightning import AugmentedBatch

__all__ = ["LearningToReweight", "MetaWeightNet"]

VALIDATION_ROWS = 100  # per step, drawn anew


class LearningToReweight:
    """Weights in proportion to what each row is worth in one step (Ren et al. 2018).

    Args:
        validation: Inputs and labels of the rows that steer.
    """

    def __init__(self, validation: tuple[Tensor, Tensor]) -> None:
        self.validation = validation

    def weigh(self, net: nn.Module, batch: AugmentedBatch) -> Tensor:
        """Return the weight of every row; those of the augmented ones have a mean of 1, or 0."""
        params, losses = row_losses(net, batch)
        share = torch.zeros_like(losses, requires_grad=True)
        ahead = step_ahead(params, (share * losses).sum(), rate=1.0)  # the rate cancels out
        (slope,) = torch.autograd.grad(self.validation_loss(net, ahead), share)
        worth = (-slope).clamp(min=0) * batch.augmented
        mean = worth.sum() / batch.augmented.sum().clamp(min=1)
        return torch.where(batch.augmented, worth / mean.clamp(min=1e-12), 1)

    def validation_loss(self, net: nn.Module, params: dict[str, Tensor]) -> Tensor:
        """Return the loss of validation rows in training mode, as the authors have it."""
        inputs, target = self.validation
        rows = torch.randperm(len(target))[:VALIDATION_ROWS]
        return F.cross_entropy(call(net, params, inputs[rows]), target[rows])


class MetaWeightNet(LearningToReweight):
    """Weights that a small network makes of each row's loss (Shu et al. 2019).

    Its step ahead, its size and its optimiser are those of the authors.

    Args:
        validation: As for `LearningToReweight`.
    """

    def __init__(self, validation: tuple[Tensor, Tensor]) -> None:
        super().__init__(validation)
        self.net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3, weight_decay=1e-4)

    def weigh(self, net: nn.Module, batch: AugmentedBatch) -> Tensor:
        """Take a step of the weights' network, and return the weight of every row."""
        params, losses = row_losses(net, batch)
        weights = self._weights(losses, batch)
        ahead = step_ahead(params, (weights * losses).sum() / weights.sum(), rate=0.1)
        self.optimizer.zero_grad()
        self.validation_loss(net, ahead).backward(inputs=list(self.net.parameters()))
        self.optimizer.step()
        return self._weights(losses, batch).detach()

    def _weights(self, losses: Tensor, batch: AugmentedBatch) -> Tensor:
        found = self.net(losses.detach().unsqueeze(1)).squeeze(1)
        return torch.where(batch.augmented, found, 1)


def call(net: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Return logits under other parameters; the network's buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return functional_call(net, {**params, **buffers}, (inputs,))


def row_losses(net: nn.Module, batch: AugmentedBatch) -> tuple[dict[str, Tensor], Tensor]:
    """Return copies of the parameters, and the loss of every row under them."""
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    logits = call(net, params, batch.inputs)
    return params, F.cross_entropy(logits, batch.target, reduction="none")


def step_ahead(params: dict[str, Tensor], loss: Tensor, rate: float) -> dict[str, Tensor]:
    """Return parameters after a step of gradient descent that can be differentiated."""
    slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return {
        name: param - rate * slope
        for (name, param), slope in zip(params.items(), slopes, strict=True)
    }
