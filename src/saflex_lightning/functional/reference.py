"""Gradient inner products by their definition: what engines and solve are checked against."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .settings import ScoreSpace, Settings

__all__ = ["inner_products_reference"]


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
