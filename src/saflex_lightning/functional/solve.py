"""The solve: from the derivative of a batch's scores to sample weights and soft labels.

The derivative Z is that of a model's scores along the descent direction t = -g of the validation
loss, so a positive inner product Pi always means "training on this row, labelled so, lowers
validation loss". One row per sample, one column per class. Where several processes share a batch,
every statistic is one of the whole batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .losses import NO_OPTIONS, LossOptions, dense_target
from .ranks import Ranks
from .settings import PRESETS, ScoreSpace, Settings

__all__ = [
    "SAflexSolution",
    "inner_products",
    "learned_labels",
    "learned_weights",
    "loss_inner_products",
    "solve",
]

_FLOOR = 1e-12  # below this, a root mean square counts as zero
_CLASS_PRIOR = 4.0  # pseudo-rows of average weight that steady a class's mean weight
_CLASS_LIMIT = 5.0  # largest factor by which a class is lifted
_COLD = 1e-6  # below this times beta, or this, a temperature may let float32 overflow


@dataclass(frozen=True)
class SAflexSolution:
    """What one solve learned about a batch; all tensors are detached.

    Attributes:
        weights: Sample weights, ``(batch,)``, non-negative; 1 for clean rows; over all ranks the
            augmented ones sum to their number, or are all 0 when every one is dropped.
        soft_labels: ``(batch, classes)``; rows sum to 1; the target itself for clean rows.
        inner_products: What the rules saw, ``(batch, classes)``; 0 for clean rows.
        inner_product_rms: Root mean square over augmented rows before normalisation, scalar.
        failed: Whether the solve met a non-finite number and fell back to weights 1 and the
            upstream labels, scalar bool.
    """

    weights: Tensor
    soft_labels: Tensor
    inner_products: Tensor
    inner_product_rms: Tensor
    failed: Tensor


@torch.no_grad()
def solve(
    jvp: Float[Tensor, "batch classes"],
    probs: Float[Tensor, "batch classes"],
    target: Tensor,
    augmented: Bool[Tensor, " batch"] | None = None,
    settings: Settings = PRESETS["gradient"],
    *,
    balance_classes: bool = True,
    options: LossOptions = NO_OPTIONS,
    generator: torch.Generator | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  has no state
) -> SAflexSolution:
    r"""Learn sample weights and soft labels of a batch from the derivative of its scores.

    .. math::
        \Pi_{ik} = Z_{ik} - \sum_j p_{ij} Z_{ij}, \qquad
        y_i = \mathrm{softmax}\big((\Pi_i + \beta\, e_i + \text{gumbel}) / \tau\big), \qquad
        w_i = \mathbb 1[\Pi_i \cdot y_i \ge 0]

    is Algorithm 1; the default weights are a sigmoid of the upstream label's inner product.
    Clean rows keep weight 1 and their own label. A non-finite number anywhere gives weights 1 and
    upstream labels to the whole batch, on every rank.

    Args:
        jvp: Z, the derivative of the scores along the descent direction, ``(batch, classes)``;
            rows of clean samples are not read.
        probs: Softmax of the scores, ``(batch, classes)``.
        target: Upstream labels, ``(batch,)`` int64 or ``(batch, classes)`` float.
        augmented: True where a row is refined, ``(batch,)``; None refines all rows.
        settings: The rules; see `Settings`. The preset ``"gradient"`` by default.
        balance_classes: Renormalise sigmoid weights inside each class; off for contrastive tasks,
            whose classes are the rows themselves.
        options: Class weights and label smoothing of the training loss.
        generator: Source of the Gumbel noise, on the CPU; None draws from the global one.
        ranks: The processes that share the batch.

    Returns:
        The weights, labels and inner products.

    References:
        Ding et al. 2024, Theorem 1 and Algorithm 1, lines 3 to 5. The paper prints the inner
        products with the opposite sign.
    """
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    labels = dense_target(target, probs.shape[-1], probs.dtype)
    if augmented is None:
        augmented = torch.ones(probs.shape[0], dtype=torch.bool, device=probs.device)
    clean = ~augmented.unsqueeze(-1)
    jvp = jvp.to(probs.dtype).masked_fill(clean, 0)

    squares = jvp.square().sum(-1)
    sums = ranks.sum(torch.column_stack([jvp, squares, augmented]).sum(0))
    count, num_classes = sums[-1].clamp(min=1), probs.shape[-1]
    means = sums[:-1] / count
    if settings.normalize:
        jvp = jvp - means[:-1]
    products = inner_products(jvp, probs, settings.score_space)
    products = loss_inner_products(products, *options)
    products = products.masked_fill(clean, 0)
    flat = products.flatten()
    rms = (ranks.sum(flat.dot(flat)) / (count * num_classes)).sqrt()
    failed = ~(rms < torch.inf)
    if settings.normalize:
        # Where centring leaves nothing but rounding, that must not be blown up to size 1.
        rounding = means[-1].sqrt() * (8 * torch.finfo(probs.dtype).eps / num_classes**0.5)
        products = products / rms.clamp(min=_FLOOR).maximum(rounding)

    noise = _gumbel_noise(products, generator) if settings.gumbel else None
    soft_labels = learned_labels(products, labels, settings, noise)
    kept = clean | failed
    soft_labels = torch.where(kept, labels, soft_labels)
    weights = learned_weights(
        products,
        labels,
        soft_labels,
        augmented,
        settings,
        balance_classes=balance_classes,
        ranks=ranks,
    )
    weights = weights.masked_fill(kept.squeeze(-1), 1)
    return SAflexSolution(weights, soft_labels, products, rms, failed)


def inner_products(
    jvp: Float[Tensor, "batch classes"],
    probs: Float[Tensor, "batch classes"],
    score_space: ScoreSpace = Settings.score_space,
) -> Float[Tensor, "batch classes"]:
    r"""Return the gradient inner products in the chosen score space.

    With the logits' derivative Z and probabilities p: log-probabilities move by
    :math:`Z_{ik} - \sum_j p_{ij} Z_{ij}`, probabilities by :math:`p_{ik}` times that.
    In log-probability space ``(probs * Pi).sum(-1)`` is 0, in probability space ``Pi.sum(-1)``.

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


def learned_labels(
    products: Float[Tensor, "batch classes"],
    labels: Float[Tensor, "batch classes"],
    settings: Settings,
    noise: Float[Tensor, "batch classes"] | None = None,
) -> Float[Tensor, "batch classes"]:
    r"""Return the label distributions of a rule; rows sum to 1.

    .. math:: y_i = \mathrm{softmax}\big((\Pi_i + \beta\, e_i + \text{noise}) / \tau\big)

    The softmax is the linear programme over labels with an entropy term of weight tau; beta is
    its prior. As tau goes to 0 it becomes the argmax. Where no other class leads by beta, the
    noise-free label keeps its argmax (Ding et al. 2024, Algorithm 1, line 4; Theorem 1).
    """
    rule, num_classes = settings.label_rule, labels.shape[-1]
    if rule == "keep" or (rule == "auto" and num_classes <= 2):
        return labels
    objective = torch.add(products, labels, alpha=settings.label_penalty)
    if noise is not None:
        objective = objective + noise
    if rule == "argmax":
        return dense_target(objective.argmax(-1), num_classes, labels.dtype)
    if settings.temperature < _COLD * max(1.0, settings.label_penalty):
        # Relative to the largest entry nothing overflows.
        objective = objective - objective.amax(-1, keepdim=True)
    lowest = torch.finfo(objective.dtype).tiny
    return torch.softmax(objective / max(settings.temperature, lowest), dim=-1)


def learned_weights(
    products: Float[Tensor, "batch classes"],
    labels: Float[Tensor, "batch classes"],
    soft_labels: Float[Tensor, "batch classes"],
    augmented: Bool[Tensor, " batch"],
    settings: Settings,
    *,
    balance_classes: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008  has no state
) -> Float[Tensor, " batch"]:
    r"""Return weights whose augmented entries sum to their number, or are all 0.

    ``"sigmoid"`` gives :math:`s_i = \sigma(\sum_k y_{ik} \Pi_{ik})` of the upstream label and then
    restores each class's share:
    :math:`w_i = s_i \sum_k y_{ik} c_k` with
    :math:`c_k = \min(5, (n_k + m) / (S_k + m \bar s))`, n and S the sums of y and of s y over
    augmented rows, m = 4 rows of average weight that steady small classes. The other rules are
    those of Ding et al. 2024, Algorithm 1, line 5, and Theorem 1, and of Ren et al. 2018.
    """
    mask = augmented.to(products.dtype)
    raw = mask * _raw_weights(products, labels, soft_labels, settings.weight_rule)
    sums = ranks.sum((torch.stack([mask, raw]).unsqueeze(-1) * labels).sum(1))
    least = torch.finfo(raw.dtype).tiny  # weights that are all 0 stay so
    count, total = totals = sums.sum(1, keepdim=True).clamp(min=least)
    if settings.weight_rule == "sigmoid" and balance_classes:
        average_row = totals / count
        rows_of_class, weight_of_class = torch.add(sums, average_row, alpha=_CLASS_PRIOR)
        factors = (rows_of_class / weight_of_class).clamp(max=_CLASS_LIMIT)
        raw = raw * (labels * factors).sum(-1)  # a matrix product autocast would round
        total = sums[1].dot(factors).clamp(min=least)
    return count * (raw / total)


def _raw_weights(products: Tensor, labels: Tensor, soft_labels: Tensor, rule: str) -> Tensor:
    if rule == "sigmoid":
        return torch.sigmoid((labels * products).sum(-1))
    if rule == "expected":
        return ((soft_labels * products).sum(-1) >= 0).to(products.dtype)
    if rule == "sum":
        return (products.sum(-1) >= 0).to(products.dtype)
    if rule == "positive":
        return (labels * products).sum(-1).clamp(min=0)
    return torch.ones_like(products[:, 0])


def _gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that the noise of a seed is the same on every device.
    draws = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=generator)
    noise = -draws.clamp(min=torch.finfo(torch.float64).tiny).log()
    return noise.to(like, non_blocking=like.is_cuda)
