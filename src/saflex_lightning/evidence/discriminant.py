r"""Do a row's scores fit its label? Judged by validation rows, calibrated.

The scores h of remembered validation rows, with class means m and shared covariance S, give a
Gaussian discriminant, whose logits are tempered as two-fold likelihood on these rows asks for:

.. math::
    q_{ik} = \mathrm{softmax}_k\big(\tau\, (\log \pi_k - \tfrac12 \|h_i - m_k\|_S^2)\big).

What this likelihood is above that of the frequencies of the classes is the information I, in nats
per row: how much the discriminant can be trusted to tell.

The same covariance makes the gradient of their loss, for a linear layer on top of the scores, a
second-order step, along which the scores of a training row move by Z:

.. math::
    G = \frac 1 V \sum_v r_v (h_v - \mu)^\top, \qquad b = \frac 1 V \sum_v r_v, \qquad
    Z_i = -G S^{-1} (h_i - \mu) - b,

with residuals r, the gradient of each row's loss with respect to its scores. Everything is linear
in h, so that a row is judged by two small matrix products.

Of more than `MOST_SCORES` scores the covariance is taken to be diagonal: it would have more entries
than the remembered rows can tell, and solving with it would take most of the time of a fit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saflex_lightning.functional.solve import inner_products

__all__ = [
    "MOST_SCORES",
    "TEMPERATURES",
    "Discriminant",
    "best_temperature",
    "fit_discriminant",
]

MOST_SCORES = 1000  # with a covariance that is not diagonal
_PRIOR = 1.0  # rows of average scores that every class has beside its own
_RIDGE = 0.1  # in units of the covariance's mean diagonal
_FLOOR = 1e-12  # below this, a variance counts as zero
TEMPERATURES = (0.03, 0.06, 0.1, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0)


class Discriminant(NamedTuple):
    """What rows are judged with; ``scores`` is the number of scores.

    Attributes:
        center: mu, ``(scores,)``.
        matrix: S^-1 m beside -S^-1 G^T, ``(scores, 2 classes)``.
        offsets: Of the logits, and -b, ``(2 classes,)``.
    """

    center: Tensor
    matrix: Tensor
    offsets: Tensor

    def judge(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the untempered logits and Pi, where positive lowers the validation loss.

        Both are ``(rows, classes)``; there must be as many scores as classes.
        """
        logits, moves = self._logits_and_moves(scores)
        return logits, inner_products(moves, scores.softmax(-1))

    def logits(self, scores: Tensor) -> Tensor:
        """Return the untempered logits, ``(rows, classes)``, of any number of scores."""
        return self._logits_and_moves(scores)[0]

    def _logits_and_moves(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        logits, moves = torch.addmm(self.offsets, scores - self.center, self.matrix).chunk(2, 1)
        return logits, moves


def fit_discriminant(
    scores: Tensor, residuals: Tensor, labels: Tensor, present: Tensor
) -> Discriminant:
    """Return the discriminant of validation rows by the formulas at the top of this file.

    ``present`` is 1 for rows that count, else 0; the others are 0 throughout. A class mean is drawn
    to the mean of all rows as if one more row lay there, so that a class without validation rows
    has a small posterior instead of none.
    """
    rows = _class_means(scores, labels, present)
    bias = residuals.sum(0) / rows.size
    gradient = rows.centred.T @ residuals / rows.size
    solved = _solve(rows, torch.cat([rows.means.T, gradient], 1))
    directions, step = solved.split(len(rows.means), dim=1)
    offsets = _offsets(rows, directions)
    matrix = torch.cat([directions, -step], 1)
    return Discriminant(rows.center, matrix, torch.cat([offsets, -bias]))


class _ClassMeans(NamedTuple):
    """Sets of rows by their classes: ``centred`` on all of a set, and ``within`` their classes."""

    size: Tensor
    center: Tensor
    centred: Tensor
    counts: Tensor
    means: Tensor
    within: Tensor


def _class_means(scores: Tensor, labels: Tensor, present: Tensor) -> _ClassMeans:
    size = present.sum(-1, keepdim=True).clamp(min=1)
    center = scores.sum(-2) / size
    centred = (scores - center.unsqueeze(-2)) * present.unsqueeze(-1)
    counts = labels.sum(-2) + _PRIOR
    means = (labels.mT @ centred) / counts.unsqueeze(-1)
    return _ClassMeans(size, center, centred, counts, means, centred - labels @ means)


def _offsets(rows: _ClassMeans, directions: Tensor) -> Tensor:
    return rows.counts.log() - 0.5 * (rows.means * directions.mT).sum(-1)


def _solve(rows: _ClassMeans, columns: Tensor) -> Tensor:
    """Return S^-1 times columns, with the covariance S of rows within their classes."""
    within, size = rows.within, rows.size
    if within.shape[-1] > MOST_SCORES:
        variances = within.square().sum(-2) / size
        ridge = (_RIDGE * variances.mean(-1, keepdim=True)).clamp(min=_FLOOR)
        return columns / (variances + ridge).unsqueeze(-1)
    covariance = within.mT @ within / size.unsqueeze(-1)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    ridge = (_RIDGE * diagonal.mean(-1, keepdim=True)).clamp(min=_FLOOR)
    ridged = covariance.diagonal_scatter(diagonal + ridge, dim1=-2, dim2=-1)
    factor = torch.linalg.cholesky_ex(ridged)[0]  # does not wait for a check
    return torch.cholesky_solve(columns, factor)


def best_temperature(scores: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tau under which each half of the rows is most likely by the other half, and I.

    Both are scalars. I is negative where the scores tell less than the frequencies of the classes.
    """
    choices = scores.new_tensor(TEMPERATURES)
    given = scores, labels, present
    if len(scores) % 2:  # a row that is not there makes the halves equal
        given = tuple(torch.cat([part, torch.zeros_like(part[:1])]) for part in given)

    h, y, there = (torch.stack([part[::2], part[1::2]]) for part in given)
    rows = _class_means(h, y, there)
    directions = _solve(rows, rows.means.mT)
    others = h.flip(0) - rows.center.unsqueeze(1)
    logits = others @ directions + _offsets(rows, directions).unsqueeze(1)
    tempered = torch.log_softmax(choices.view(-1, 1, 1, 1) * logits, -1)
    frequencies = (rows.counts / rows.counts.sum(-1, keepdim=True)).log().unsqueeze(1)
    truth, count = y.flip(0), y.sum().clamp(min=1)
    likely = tempered.flatten(1) @ truth.flatten()  # makes nothing as large as these
    information, best = ((likely - (frequencies * truth).sum()) / count).max(0)
    return choices.take(best), information  # to index would wait for the device
