"""Dense references in double precision: slow, obviously right, and free of the code under test.

Layout: one row per sample, one column per class, and parameters laid end to end in the last
dimension. Nothing here imports the library.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda scores: scores,
    "log_probs": lambda scores: scores.log_softmax(-1),
    "probs": lambda scores: scores.softmax(-1),
}


class Problem(NamedTuple):
    """A small classifier with one training and one validation batch, all float64."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    val_inputs: Tensor
    val_target: Tensor

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def val_loss(self, **options) -> Tensor:
        return F.cross_entropy(self.model(self.val_inputs), self.val_target, **options)


def make_problem(seed: int, *, rows=4, val_rows=12, features=5, hidden=7, classes=4) -> Problem:
    """Draw a random multi-layer perceptron and random data for it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * normal(*parameter.shape))
    return Problem(
        model,
        normal(rows, features),
        torch.randint(classes, (rows,), generator=generator),
        normal(val_rows, features),
        torch.randint(classes, (val_rows,), generator=generator),
    )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def dense_jacobian(model: nn.Module, inputs: Tensor, score_space: str = "logits") -> Tensor:
    """Return d f_k(x_i) / d theta by `torch.func.jacrev`, ``(batch, classes, parameters)``."""
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return OUTPUTS[score_space](torch.func.functional_call(model, values, (inputs,)))

    jacobian = torch.func.jacrev(outputs)(params)
    return torch.cat([part.flatten(2) for part in jacobian.values()], dim=-1)


def looped_jacobian(scores: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return the same by one backward pass per entry, for models with tied or aliased weights."""
    rows = []
    for entry in scores.reshape(-1):
        parts = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        filled = [
            torch.zeros_like(parameter) if part is None else part
            for parameter, part in zip(params, parts, strict=True)
        ]
        rows.append(flatten(filled))
    return torch.stack(rows).unflatten(0, scores.shape)


def reweight_by_double_backward(problem: Problem, lr: float = 0.1) -> Tensor:
    """Return the weights of learning to reweight (Ren et al. 2018, Algorithm 1), ``(batch,)``.

    The derivative of the validation loss after one step of gradient descent on the weighted loss,
    with respect to the weights at 0; its negative part, made to sum to 1, or 0 where it is empty.
    """
    weights = torch.zeros(len(problem.target), dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(problem.model(problem.inputs), problem.target, reduction="none")
    params = dict(problem.model.named_parameters())
    steps = torch.autograd.grad((weights * losses).sum(), params.values(), create_graph=True)
    stepped = {
        name: parameter - lr * step
        for (name, parameter), step in zip(params.items(), steps, strict=True)
    }
    val_logits = torch.func.functional_call(problem.model, stepped, (problem.val_inputs,))
    (slope,) = torch.autograd.grad(F.cross_entropy(val_logits, problem.val_target), weights)
    raised = (-slope).clamp(min=0)
    total = raised.sum()
    return raised / total if total > 0 else raised


def dense_val_gradient(model: nn.Module, inputs: Tensor, target: Tensor, **options) -> Tensor:
    """Return g, the gradient of the mean validation cross-entropy, ``(parameters,)``."""
    loss = F.cross_entropy(model(inputs), target, **options)
    return flatten(torch.autograd.grad(loss, list(model.parameters())))


def dense_products(
    model: nn.Module, inputs: Tensor, val_gradient: Tensor, score_space: str = "log_probs"
) -> Tensor:
    """Return Pi, the product of the dense Jacobian with t = -g, ``(batch, classes)``."""
    return dense_jacobian(model, inputs, score_space) @ -val_gradient


def algorithm_1_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    val_batch: tuple[Tensor, Tensor],
    *,
    learning_rate: float,
    temperature: float = 0.01,
    label_penalty: float = 0.0,
    noise: Tensor | None = None,
    augmented: Tensor | None = None,
    score_space: str = "log_probs",
    theorem_1: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take one step of Algorithm 1 (or of Theorem 1's solution) by hand.

    Lines of the algorithm: 3, the gradient inner products of Eq. 8 and 9, with the minus that the
    paper leaves out; 4, soft labels; 5, sample weights; 6, renormalise; 7, plain descent.
    Returns the weights and the soft labels that were used.
    """
    inputs, target = batch
    products = dense_products(model, inputs, dense_val_gradient(model, *val_batch), score_space)
    num_rows, num_classes = products.shape
    own = torch.eye(num_classes, dtype=products.dtype)[target]

    objective = products + label_penalty * own
    if noise is not None:
        objective = objective + noise
    if theorem_1:
        labels = torch.eye(num_classes, dtype=products.dtype)[objective.argmax(-1)]
        keep = products.sum(-1) >= 0
    else:
        labels = torch.softmax(objective / temperature, -1)
        keep = (products * labels).sum(-1) >= 0

    if augmented is None:
        augmented = torch.ones(num_rows, dtype=torch.bool)
    weights = torch.ones(num_rows, dtype=products.dtype)
    kept = int((keep & augmented).sum())
    for row in range(num_rows):
        if not augmented[row]:
            labels[row] = own[row]
        elif keep[row]:
            weights[row] = int(augmented.sum()) / kept
        else:
            weights[row] = 0.0

    total = weights.sum().item()
    if total > 0:
        losses = -(labels * model(inputs).log_softmax(-1)).sum(-1)
        loss = (weights * losses).sum() / total
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= learning_rate * gradient
    return weights, labels
