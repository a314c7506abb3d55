r"""Gradient inner products of the last layer, from all validation rows that are remembered.

They need the layer's inputs (features) and no backward pass: with features h and residuals
r = p - y of the validation rows, the mean mu and covariance Sigma of training features,

.. math::
    G = \frac 1 V \sum_v r_v (h_v - \mu)^\top, \qquad b = \frac 1 V \sum_v r_v, \qquad
    Z_i = -G (\Sigma + \rho I)^{-1} (h_i - \mu) - b,

where Z moves along the descent direction of the layer's weight and bias, a second-order step's, so
that a few directions in which all features vary do not drown the others.
"""

import torch
from torch import Tensor

from saflex_lightning.engines.direction import descent_direction
from saflex_lightning.engines.head import linear_jvp
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.solve import inner_products

__all__ = ["damped_factor", "last_layer_products", "rescale_weights"]

_RIDGE = 0.1  # rho, in units of the covariance's mean diagonal
_FLOOR = 1e-12  # below this, a variance counts as zero


def last_layer_products(
    features: Tensor,
    probs: Tensor,
    mean: Tensor,
    covariance: Tensor,
    val_features: Tensor,
    val_residuals: Tensor,
    present: Tensor | None = None,
) -> Tensor:
    """Return Pi of training rows, ``(batch, classes)``, by the formula at the top of this file.

    ``present`` is 1 for validation rows that count, else 0; the others are 0 in features and
    residuals. Positive lowers the validation loss; ``(probs * Pi).sum(-1)`` is 0.
    """
    size = val_features.shape[0] if present is None else present.sum().clamp(min=1)
    bias = val_residuals.sum(0) / size
    gradient = val_features.T @ val_residuals / size - torch.outer(mean, bias)
    step = torch.cholesky_solve(gradient, damped_factor(covariance))
    direction = descent_direction([step.T, bias])
    return inner_products(linear_jvp(features - mean, direction), probs)


def damped_factor(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of a covariance with a ridge, without waiting for a check."""
    ridge = (_RIDGE * covariance.diagonal().mean()).clamp(min=_FLOOR)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky_ex(covariance + ridge * eye)[0]


def rescale_weights(weights: Tensor, factors: Tensor, augmented: Tensor, ranks: Ranks) -> Tensor:
    """Return the weights with those of augmented rows multiplied by factors, their sum kept."""
    raised = torch.where(augmented, weights * factors, 0)
    before = torch.where(augmented, weights, 0).sum()
    sums = ranks.sum(torch.stack([before, raised.sum()]))
    scale = sums[0] / torch.where(sums[1] > 0, sums[1], 1)
    return torch.where(augmented, raised * scale, weights)
