"""Gradient inner products: from the derivative of the scores, and by their definition.

The derivative Z is that of a model's scores along the descent direction t = -g of the validation
loss, so a positive inner product always means "training on this row, labelled so, lowers
validation loss".
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .settings import ScoreSpace, Settings

__all__ = ["inner_products", "inner_products_reference", "loss_inner_products"]


def inner_products(
    jvp: Float[Tensor, "batch classes"],
    probs: Float[Tensor, "batch classes"],
    score_space: ScoreSpace = Settings.score_space,
) -> Float[Tensor, "batch classes"]:
    r"""Return the gradient inner products in the chosen score space.

    With the logits' derivative Z and probabilities p: log-probabilities move by
    :math:`Z_{ik} - \sum_j p_{ij} Z_{ij}`, probabilities by :math:`p_{ik}` times that.

    Args:
        jvp: Z, ``(batch, classes)``.
        probs: p, ``(batch, classes)``; rows sum to 1.
        score_space: ``"log_probs"``, ``"probs"`` or ``"logits"``.

    Returns:
        Pi, ``(batch, classes)``. In log-probability space ``(probs * Pi).sum(-1)`` is 0, in
        probability space ``Pi.sum(-1)`` is 0.

    Example:
        >>> Z, p = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> inner_products(Z, p, "log_probs")
        tensor([[ 1., -1.]])
    """
    if score_space == "logits":
        return jvp
    products = jvp - (probs * jvp).sum(-1, keepdim=True)
    return products * probs if score_space == "probs" else products


def loss_inner_products(
    products: Float[Tensor, "batch classes"],
    class_weight: Float[Tensor, " classes"] | None,
    label_smoothing: float,
) -> Float[Tensor, "batch classes"]:
    r"""Return the inner products of the loss that is really minimised.

    A row labelled k trains on :math:`-(1-\epsilon) c_k \log p_k - \epsilon/K \sum_j c_j \log p_j`;
    its inner product is the same combination of the plain ones.
    """
    if class_weight is not None:
        products = products * class_weight.to(products)
    if label_smoothing:
        uniform = products.mean(-1, keepdim=True)
        products = (1 - label_smoothing) * products + label_smoothing * uniform
    return products


def inner_products_reference(
    scores: Float[Tensor, "batch classes"],
    params: Sequence[Tensor],
    val_gradient: Sequence[Tensor],
    score_space: ScoreSpace = Settings.score_space,
) -> Float[Tensor, "batch classes"]:
    r"""Return :math:`\Pi_{ik} = -\langle \nabla_\theta f_k(x_i), g \rangle`, one entry at a time.

    Slow and obviously right: one backward pass for each sample and class. The engines compute the
    same numbers in one pass; this is for checking them and for reading.

    Args:
        scores: Logits with their autograd graph, ``(batch, classes)``.
        params: Parameters the logits were computed with.
        val_gradient: g, the gradient of the mean validation loss, one tensor per parameter.
        score_space: What f is, see `Settings`.

    Returns:
        ``(batch, classes)``, detached.

    References:
        Ding et al. 2024, Eq. 8 and 9, with the minus that the paper leaves out.
    """
    spaces: dict[ScoreSpace, Callable[[], Tensor]] = {
        "logits": lambda: scores,
        "log_probs": lambda: scores.log_softmax(-1),
        "probs": lambda: scores.softmax(-1),
    }
    outputs = spaces[score_space]()
    products = torch.zeros_like(scores)
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            gradients = torch.autograd.grad(
                outputs[row, column], params, retain_graph=True, allow_unused=True
            )
            for gradient, val_part in zip(gradients, val_gradient, strict=True):
                if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]  unused
                    products[row, column] -= (gradient * val_part).sum()
    return products.detach()
