"""The solve: from the scores' tangent of a batch to sample weights and soft labels.

Layout used throughout: one row per sample, one column per class. ``scores_tangent`` Z is the
derivative of the model's scores along the descent direction t = -g of the validation loss, so a
positive inner product always means "training on this row, labelled so, lowers validation loss".
Where several processes share a batch, ``reduce_sum`` adds a tensor over them, and every statistic
below is one of the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .losses import dense_target, widen
from .presets import LabelRule, Preset, ScoreSpace, WeightRule

__all__ = [
    "ReduceSum",
    "SAflexSolution",
    "inner_products",
    "learned_labels",
    "learned_weights",
    "loss_inner_products",
    "project_tangent",
    "solution_metrics",
    "solve",
]

_FLOOR = 1e-12  # below this root mean square, inner products count as zero
_CLASS_PRIOR = 4.0  # pseudo-rows of average weight that steady a class's mean weight
_CLASS_LIMIT = 5.0  # largest factor by which a class is lifted

ReduceSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SAflexSolution:
    """What one solve learned about a batch; all tensors are detached.

    Attributes:
        weights: Sample weights, ``(batch,)``, non-negative; 1 for clean rows; over all ranks the
            augmented ones sum to their number, or are all 0 when every one is dropped.
        soft_labels: ``(batch, classes)``; rows sum to 1; the target itself for clean rows.
        inner_products: What the rules saw, ``(batch, classes)``; 0 for clean rows.
        inner_product_rms: Root mean square over augmented rows before normalisation, scalar.
        finite: False where the solve met a non-finite number and fell back to weights 1 and the
            upstream labels, scalar bool.
    """

    weights: Tensor
    soft_labels: Tensor
    inner_products: Tensor
    inner_product_rms: Tensor
    finite: Tensor


@torch.no_grad()
def solve(
    scores_tangent: Float[Tensor, "batch classes"],
    probs: Float[Tensor, "batch classes"],
    target: Tensor,
    augmented: Bool[Tensor, " batch"] | None = None,
    *,
    score_space: ScoreSpace = Preset.score_space,
    normalize: bool = Preset.normalize,
    label_rule: LabelRule = Preset.label_rule,
    label_penalty: float = Preset.label_penalty,
    temperature: float = Preset.temperature,
    gumbel: bool = Preset.gumbel,
    weight_rule: WeightRule = Preset.weight_rule,
    balance_classes: bool = True,
    class_weight: Float[Tensor, " classes"] | None = None,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
    reduce_sum: ReduceSum | None = None,
) -> SAflexSolution:
    r"""Learn sample weights and soft labels of a batch from the scores' tangent.

    .. math::
        \Pi_{ik} = Z_{ik} - \sum_j p_{ij} Z_{ij}, \qquad
        y_i = \mathrm{softmax}\big((\Pi_i + \beta\, e_i + \text{gumbel}) / \tau\big), \qquad
        w_i = \mathbb 1[\Pi_i \cdot y_i \ge 0]

    is Algorithm 1; the default weights are a sigmoid of the upstream label's inner product.
    Clean rows keep weight 1 and their own label. A non-finite number anywhere gives weights 1 and
    upstream labels to the whole batch, on every rank.

    Args:
        scores_tangent: Z, ``(batch, classes)``; rows of clean samples are not read.
        probs: Softmax of the scores, ``(batch, classes)``.
        target: Upstream labels, ``(batch,)`` int64 or ``(batch, classes)`` float.
        augmented: True where a row is refined, ``(batch,)``; None refines all rows.
        score_space: See `Preset`.
        normalize: See `Preset`.
        label_rule: See `Preset`.
        label_penalty: See `Preset`.
        temperature: See `Preset`.
        gumbel: See `Preset`.
        weight_rule: See `Preset`.
        balance_classes: Renormalise sigmoid weights inside each class; off for contrastive tasks,
            whose classes are the rows themselves.
        class_weight: Class weights of the training loss, ``(classes,)``.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        generator: Source of the Gumbel noise, on the CPU; None draws from the global one.
        reduce_sum: Adds a tensor over the ranks that share the batch; None means one process.

    Returns:
        The weights, labels and inner products.

    References:
        Ding et al. 2024, Theorem 1 and Algorithm 1, lines 3 to 5. The paper prints the inner
        products with the opposite sign.
    """
    reduce_sum = reduce_sum or _identity
    probs = widen(probs)
    labels = dense_target(target, probs.shape[-1], probs.dtype)
    if augmented is None:
        augmented = torch.ones(probs.shape[0], dtype=torch.bool, device=probs.device)
    rows = augmented.unsqueeze(-1)
    tangent = torch.where(rows, scores_tangent.to(probs.dtype), 0)

    sums = reduce_sum(
        torch.cat(
            [
                tangent.sum(0),
                torch.stack([augmented.sum().to(probs.dtype), tangent.square().sum()]),
            ]
        )
    )
    count = sums[-2].clamp(min=1)
    # Where centring leaves nothing but rounding, that must not be blown up to size 1.
    rounding = 8 * torch.finfo(probs.dtype).eps * (sums[-1] / (count * probs.shape[-1])).sqrt()
    if normalize:
        tangent = torch.where(rows, tangent - sums[:-2] / count, 0)
    products = project_tangent(tangent, probs, score_space)
    products = loss_inner_products(products, class_weight, label_smoothing)
    products = torch.where(rows, products, 0)
    rms = (reduce_sum(products.square().sum()) / (count * probs.shape[-1])).sqrt()
    finite = torch.isfinite(rms)
    if normalize:
        products = products / rms.clamp(min=_FLOOR).maximum(rounding)

    soft_labels = learned_labels(
        products,
        labels,
        rule=label_rule,
        penalty=label_penalty,
        temperature=temperature,
        noise=_gumbel_noise(products, generator) if gumbel else None,
    )
    soft_labels = torch.where(rows & finite, soft_labels, labels)
    weights = learned_weights(
        products,
        labels,
        soft_labels,
        augmented,
        rule=weight_rule,
        balance_classes=balance_classes,
        reduce_sum=reduce_sum,
    )
    weights = torch.where(augmented & finite, weights, 1)
    return SAflexSolution(weights, soft_labels, products, rms, finite)


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
    rows_of_class, weight_of_class = (reduce_sum or _identity)(sums)
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


def solution_metrics(
    solution: SAflexSolution, target: Tensor, augmented: Bool[Tensor, " batch"] | None = None
) -> dict[str, Tensor]:
    r"""Return what the solution did to the augmented rows of this process, as scalars.

    Args:
        solution: A result of `solve`.
        target: Upstream labels as given to `solve`.
        augmented: As given to `solve`.

    Returns:
        ``kept_fraction`` (weight above 0), ``relabelled_fraction`` (argmax moved away from the
        upstream label's), ``effective_fraction`` :math:`(\sum w)^2 / (n \sum w^2)` (1 for equal
        weights, 0 when all are dropped), ``target_entropy`` (nats), ``inner_product_rms``. The
        fractions of a batch without augmented rows are 1, 0 and 1.
    """
    labels = solution.soft_labels
    mask = torch.ones_like(solution.weights, dtype=torch.bool) if augmented is None else augmented
    count = mask.sum().clamp(min=1)
    none = ~mask.any()
    upstream = target if target.ndim == 1 else target.argmax(-1)
    weights = torch.where(mask, solution.weights, 0)
    squares = weights.square().sum()
    effective = torch.where(
        squares > 0, weights.sum().square() / (count * squares).clamp(min=_FLOOR), 0
    )
    entropy = -(torch.xlogy(labels, labels)).sum(-1)
    return {
        "kept_fraction": ((weights > 0).sum() / count).masked_fill(none, 1.0),
        "relabelled_fraction": ((labels.argmax(-1) != upstream) & mask).sum() / count,
        "effective_fraction": effective.masked_fill(none, 1.0),
        "target_entropy": torch.where(mask, entropy, 0).sum() / count,
        "inner_product_rms": solution.inner_product_rms,
    }


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


def _gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that the noise of a seed is the same on every device.
    draws = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=generator)
    return -draws.clamp(min=torch.finfo(torch.float64).tiny).log().to(like)


def _identity(tensor: Tensor) -> Tensor:
    return tensor
