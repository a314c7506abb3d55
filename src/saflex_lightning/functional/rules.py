"""The rules: from gradient inner products to soft labels and to sample weights."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .losses import dense_target
from .presets import LabelRule, WeightRule
from .reduction import ReduceSum, sum_over_ranks

__all__ = ["learned_labels", "learned_weights"]

_FLOOR = 1e-12  # below this, the weight of a class counts as zero
_CLASS_PRIOR = 4.0  # pseudo-rows of average weight that steady a class's mean weight
_CLASS_LIMIT = 5.0  # largest factor by which a class is lifted


def learned_labels(
    products: Float[Tensor, "batch classes"],
    labels: Float[Tensor, "batch classes"],
    *,
    rule: LabelRule,
    penalty: float,
    temperature: float,
    noise: Float[Tensor, "batch classes"] | None = None,
) -> Float[Tensor, "batch classes"]:
    r"""Return the label distributions of a rule.

    .. math:: y_i = \mathrm{softmax}\big((\Pi_i + \beta\, e_i + \text{noise}) / \tau\big)

    The softmax is the linear programme over labels with an entropy term of weight tau; beta is
    its prior. As tau goes to 0 it becomes the argmax. Where no other class leads by beta, the
    noise-free label keeps its argmax.

    Args:
        products: Pi, ``(batch, classes)``.
        labels: Upstream labels, ``(batch, classes)``; rows sum to 1.
        rule: See `Preset`.
        penalty: beta, non-negative.
        temperature: tau, positive.
        noise: Added to Pi, ``(batch, classes)``.

    Returns:
        ``(batch, classes)``; rows sum to 1.

    References:
        Ding et al. 2024, Algorithm 1, line 4; Theorem 1 for the argmax.
    """
    num_classes = labels.shape[-1]
    if rule == "keep" or (rule == "auto" and num_classes <= 2):
        return labels
    objective = products + penalty * labels
    if noise is not None:
        objective = objective + noise
    if rule == "argmax":
        return dense_target(objective.argmax(-1), num_classes, labels.dtype)
    # Relative to the largest entry nothing overflows, however cold it is.
    lead = objective - objective.amax(-1, keepdim=True)
    return torch.softmax(lead / max(temperature, torch.finfo(lead.dtype).tiny), dim=-1)


def learned_weights(
    products: Float[Tensor, "batch classes"],
    labels: Float[Tensor, "batch classes"],
    soft_labels: Float[Tensor, "batch classes"],
    augmented: Bool[Tensor, " batch"],
    *,
    rule: WeightRule,
    balance_classes: bool = True,
    reduce_sum: ReduceSum | None = None,
) -> Float[Tensor, " batch"]:
    r"""Return weights whose augmented entries sum to their number.

    ``"sigmoid"`` gives :math:`s_i = \sigma(\sum_k y_{ik} \Pi_{ik})` of the upstream label and then
    restores each class's share:
    :math:`w_i = s_i \sum_k y_{ik} c_k` with
    :math:`c_k = \min(5, (n_k + m) / (S_k + m \bar s))`, n and S the sums of y and of s y over
    augmented rows, m = 4 rows of average weight that steady small classes.

    Args:
        products: Pi, ``(batch, classes)``.
        labels: Upstream labels, ``(batch, classes)``.
        soft_labels: Learned labels, ``(batch, classes)``; read by ``"expected"``.
        augmented: ``(batch,)``; weights of the other rows mean nothing.
        rule: See `Preset`.
        balance_classes: See `solve`.
        reduce_sum: See `solve`.

    Returns:
        ``(batch,)``, non-negative; all 0 where every augmented row is dropped.

    References:
        Ding et al. 2024, Algorithm 1, line 5 (``"expected"``) and Theorem 1 (``"sum"``); Ren et
        al. 2018, Algorithm 1 (``"positive"``); the sigmoid is this library's.
    """
    mask = augmented.to(products.dtype)
    raw = mask * _raw_weights(products, labels, soft_labels, rule)
    weighted = raw.unsqueeze(-1) * labels
    sums = torch.stack([(mask.unsqueeze(-1) * labels).sum(0), weighted.sum(0)])
    rows_of_class, weight_of_class = sum_over_ranks(sums, reduce_sum)
    count, total = rows_of_class.sum(), weight_of_class.sum()
    if rule == "sigmoid" and balance_classes:
        prior = _CLASS_PRIOR * total / count.clamp(min=1)
        factors = (rows_of_class + _CLASS_PRIOR) / (weight_of_class + prior).clamp(min=_FLOOR)
        factors = factors.clamp(max=_CLASS_LIMIT)
        raw = raw * (labels @ factors)
        total = (weight_of_class * factors).sum()
    return count * (raw / torch.where(total > 0, total, 1))


def _raw_weights(products: Tensor, labels: Tensor, soft_labels: Tensor, rule: WeightRule) -> Tensor:
    if rule == "sigmoid":
        return torch.sigmoid((labels * products).sum(-1))
    if rule == "expected":
        return ((soft_labels * products).sum(-1) >= 0).to(products.dtype)
    if rule == "sum":
        return (products.sum(-1) >= 0).to(products.dtype)
    if rule == "positive":
        return (labels * products).sum(-1).clamp(min=0)
    return torch.ones_like(products[:, 0])
