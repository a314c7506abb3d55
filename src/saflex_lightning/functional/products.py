"""Gradient inner products: from the scores' tangent, and by their definition.

The tangent Z is the derivative of a model's scores along the descent direction t = -g of the
validation loss, so a positive inner product always means "training on this row, labelled so, lowers
validation loss".
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .presets import Preset, ScoreSpace

__all__ = ["inner_products", "loss_inner_products", "project_tangent"]


def project_tangent(
    scores_tangent: Float[Tensor, "batch classes"],
    probs: Float[Tensor, "batch classes"],
    score_space: ScoreSpace,
) -> Float[Tensor, "batch classes"]:
    r"""Return the gradient inner products in the chosen score space.

    With logits' tangent Z and probabilities p: log-probabilities move by
    :math:`Z_{ik} - \sum_j p_{ij} Z_{ij}`, probabilities by :math:`p_{ik}` times that.

    Args:
        scores_tangent: Z, ``(batch, classes)``.
        probs: p, ``(batch, classes)``; rows sum to 1.
        score_space: ``"log_probs"``, ``"probs"`` or ``"logits"``.

    Returns:
        Pi, ``(batch, classes)``. In log-probability space ``(probs * Pi).sum(-1)`` is 0, in
        probability space ``Pi.sum(-1)`` is 0.

    Example:
        >>> Z, p = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> project_tangent(Z, p, "log_probs")
        tensor([[ 1., -1.]])
    """
    if score_space == "logits":
        return scores_tangent
    products = scores_tangent - (probs * scores_tangent).sum(-1, keepdim=True)
    return products * probs if score_space == "probs" else products


def loss_inner_products(
    products: Float[Tensor, "batch classes"],
    class_weight: Float[Tensor, " classes"] | None,
    label_smoothing: float,
) -> Float[Tensor, "batch classes"]:
    r"""Return the inner products of the loss that is really minimised.

    A row labelled k trains on :math:`-(1-\epsilon) c_k \log p_k - \epsilon/K \sum_j c_j \log p_j`;
    its inner product is the same combination of the plain ones.

    Args:
        products: Pi of the plain cross-entropy, ``(batch, classes)``.
        class_weight: c, ``(classes,)``; None means 1.
        label_smoothing: epsilon, in [0, 1).

    Returns:
        ``(batch, classes)``.
    """
    if class_weight is not None:
        products = products * class_weight.to(products)
    if label_smoothing:
        uniform = products.mean(-1, keepdim=True)
        products = (1 - label_smoothing) * products + label_smoothing * uniform
    return products


def inner_products(
    scores: Float[Tensor, "batch classes"],
    params: Sequence[Tensor],
    val_gradient: Sequence[Tensor],
    score_space: ScoreSpace = Preset.score_space,
) -> Float[Tensor, "batch classes"]:
    r"""Return :math:`\Pi_{ik} = -\langle \nabla_\theta f_k(x_i), g \rangle`, one entry at a time.

    Slow and obviously right: one backward pass for each sample and class. The engines compute the
    same numbers in one pass; this is for checking them and for reading.

    Args:
        scores: Logits with their autograd graph, ``(batch, classes)``.
        params: Parameters the logits were computed with.
        val_gradient: g, the gradient of the mean validation loss, one tensor per parameter.
        score_space: What f is, see `Preset`.

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
