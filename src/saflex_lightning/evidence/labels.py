r"""How likely is a label right? Judged by trusted rows, without training.

The discriminant of `discriminant.py`, fitted on trusted rows and tempered as ten-fold likelihood
asks for, gives posteriors q of the classes. With them the share of wrong labels among the rows in
doubt is estimated by likelihood, and the score of a row is the belief r of `weights.py`: the
probability that its given label y is right. What is left goes to the other classes,

.. math::
    p_{iy} = r_i, \qquad p_{ik} = (1 - r_i)\, \frac{q_{ik}}{1 - q_{iy}} \quad (k \ne y),

and the largest of them is the suggested label. Standard errors are those of a jackknife on the same
ten folds: the discriminant and the share are fitted again without each of them.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .discriminant import TEMPERATURES, Discriminant, fit_discriminant
from .weights import NOISE, SURE, mixture

__all__ = ["DECISIONS", "Decision", "JudgedLabels", "LabelJudge"]

_FOLDS = 10
_ERRORS = 2.0  # standard errors by which the new label of a relabelled row is likely
_OPEN = 0.01  # probability of shares of any size, whatever was seen: so all scores have an order
_FLOOR = 1e-12  # of posteriors
_MOST_SCORES = 128  # or as many as classes; of more, the principal directions count

Decision = Literal["keep", "doubt", "relabel"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)


class JudgedLabels(NamedTuple):
    """What is thought of rows; all are ``(rows,)``.

    Attributes:
        score: Probability that the given label is right, in [0, 1], float64.
        standard_error: Its standard error over draws of the trusted rows, float64.
        suggested: Most probable class, int64.
        decision: Position in `DECISIONS`, int64: "keep" where the score is one half or more;
            "relabel" where another label is more likely than not by two standard errors; else
            "doubt".
    """

    score: Tensor
    standard_error: Tensor
    suggested: Tensor
    decision: Tensor


class LabelJudge:
    """Judge labels by the scores of trusted rows.

    Until `watch` has seen rows in doubt, all labels are taken to be right.

    Args:
        scores: Of the trusted rows, ``(rows, scores)`` float: logits or features, of any number.
        labels: Their classes, ``(rows,)`` int64.
        num_classes: Number of classes, at least 2.
    """

    def __init__(self, scores: Tensor, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        order = labels.argsort(stable=True)  # so that every fold has all classes
        scores, target = scores[order].double(), one_hot(labels[order], num_classes).double()
        self._directions = _directions(scores, max(_MOST_SCORES, num_classes))
        scores = scores @ self._directions
        rows = scores, torch.zeros_like(target), target, torch.ones_like(target[:, 0])
        fold = torch.arange(len(order)) % _FOLDS
        kept = [fold != number for number in range(-1, _FOLDS)]  # all, and all but one fold
        fits = [fit_discriminant(*(each[some] for each in rows)) for some in kept]
        tau = _temperature(fits[1:], scores, target, fold)
        self._centers = torch.stack([fit.center for fit in fits]).unsqueeze(1)
        self._matrices = tau * torch.stack([fit.matrix[:, :num_classes] for fit in fits])
        self._offsets = tau * torch.stack([fit.offsets[:num_classes] for fit in fits]).unsqueeze(1)
        self._shares = scores.new_zeros(len(fits), 1, len(NOISE))  # probability of each one
        self._shares[..., 0] = 1

    def watch(self, scores: Tensor, given: Tensor) -> tuple[float, float]:
        """Estimate the share of wrong labels among the rows in doubt by some of them.

        Args:
            scores: ``(rows, scores)`` float.
            given: Their labels, ``(rows,)`` int64.

        Returns:
            The share, in [0, 0.9], and its standard error; both are large where scores tell little.
        """
        fitting = self._posteriors(scores).gather(2, self._column(given))[..., 0]
        likelihoods = self._likelihoods(fitting.clamp(SURE, 1 - SURE)).log().sum(1, keepdim=True)
        self._shares = likelihoods.softmax(-1)
        noise = torch.from_numpy(NOISE)
        share, error = _jackknife(self._shares @ noise)
        spread = self._shares[0] @ noise.square() - share.square()
        return float(share), float((spread.clamp(min=0) + error.square()).sqrt())

    def judge(self, scores: Tensor, given: Tensor) -> JudgedLabels:
        """Return what is thought of rows.

        Args:
            scores: ``(rows, scores)`` float.
            given: Their labels, ``(rows,)`` int64.
        """
        posteriors, column = self._posteriors(scores), self._column(given)
        fitting = posteriors.gather(2, column)
        fitting = fitting.clamp(min=_FLOOR)
        beliefs = fitting * (1 - torch.from_numpy(NOISE)) / self._likelihoods(fitting[..., 0])
        shares = (1 - _OPEN) * self._shares + _OPEN / len(NOISE)
        belief = (beliefs * shares).sum(-1, keepdim=True)
        others = posteriors.scatter(2, column, 0)
        others = others / others.sum(-1, keepdim=True).clamp(min=_FLOOR)
        probable = ((1 - belief) * others).scatter(2, column, belief)
        suggested = probable[0].argmax(-1)
        likely, likely_error = _jackknife(probable.gather(2, self._column(suggested))[..., 0])
        score, error = _jackknife(belief[..., 0])
        relabelled = (suggested != given) & (likely - _ERRORS * likely_error > 0.5)
        decision = torch.where(score >= 0.5, 0, torch.where(relabelled, 2, 1))
        return JudgedLabels(score, error, suggested, decision)

    def _posteriors(self, scores: Tensor) -> Tensor:
        """Return those of all fits, ``(fits, rows, classes)``."""
        centred = scores.double() @ self._directions - self._centers
        return (centred @ self._matrices + self._offsets).softmax(-1)

    def _likelihoods(self, fitting: Tensor) -> Tensor:
        """Return how likely each share of wrong labels makes labels with these posteriors."""
        slope, level = torch.from_numpy(mixture(self.num_classes))
        return level + fitting.unsqueeze(-1) * slope

    def _column(self, labels: Tensor) -> Tensor:
        return labels.view(1, -1, 1).expand(len(self._centers), -1, -1)


def _directions(scores: Tensor, most: int) -> Tensor:
    """Return the axes along which scores are judged, ``(scores, at most so many)``."""
    if scores.shape[1] <= most:
        return torch.eye(scores.shape[1], dtype=scores.dtype)
    return torch.linalg.svd(scores - scores.mean(0), full_matrices=False)[2][:most].T


def _temperature(fits: list[Discriminant], scores: Tensor, labels: Tensor, fold: Tensor) -> Tensor:
    """Return the tau under which each fold is most likely by the fit without it, scalar."""
    choices = scores.new_tensor(TEMPERATURES)
    likelihoods = torch.zeros_like(choices)
    for number, fit in enumerate(fits):
        left_out = fold == number
        tempered = (choices.view(-1, 1, 1) * fit.logits(scores[left_out])).log_softmax(-1)
        likelihoods += (tempered * labels[left_out]).sum((1, 2))
    return choices[likelihoods.argmax()]


def _jackknife(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of the first fit, and the standard error by the others."""
    return values[0], ((_FOLDS - 1) * values[1:].var(0, correction=0)).sqrt()
