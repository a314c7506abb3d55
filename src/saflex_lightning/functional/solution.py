"""The solve: from the scores' tangent of a batch to sample weights and soft labels.

Layout used throughout: one row per sample, one column per class. Where several processes share a
batch, ``reduce_sum`` adds a tensor over them, and every statistic below is one of the whole batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .losses import dense_target, widen
from .presets import LabelRule, Preset, ScoreSpace, WeightRule
from .products import loss_inner_products, project_tangent
from .reduction import ReduceSum, sum_over_ranks
from .rules import learned_labels, learned_weights

__all__ = ["SAflexSolution", "solution_metrics", "solve"]

_FLOOR = 1e-12  # below this root mean square, inner products count as zero


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
    probs = widen(probs)
    labels = dense_target(target, probs.shape[-1], probs.dtype)
    if augmented is None:
        augmented = torch.ones(probs.shape[0], dtype=torch.bool, device=probs.device)
    rows = augmented.unsqueeze(-1)
    tangent = torch.where(rows, scores_tangent.to(probs.dtype), 0)

    numbers = torch.stack([augmented.sum().to(probs.dtype), tangent.square().sum()])
    sums = sum_over_ranks(torch.cat([tangent.sum(0), numbers]), reduce_sum)
    count = sums[-2].clamp(min=1)
    # Where centring leaves nothing but rounding, that must not be blown up to size 1.
    rounding = 8 * torch.finfo(probs.dtype).eps * (sums[-1] / (count * probs.shape[-1])).sqrt()
    if normalize:
        tangent = torch.where(rows, tangent - sums[:-2] / count, 0)
    products = project_tangent(tangent, probs, score_space)
    products = loss_inner_products(products, class_weight, label_smoothing)
    products = torch.where(rows, products, 0)
    squares = sum_over_ranks(products.square().sum(), reduce_sum)
    rms = (squares / (count * probs.shape[-1])).sqrt()
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


def _gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that the noise of a seed is the same on every device.
    draws = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=generator)
    noise = -draws.clamp(min=torch.finfo(torch.float64).tiny).log()
    return noise.to(like, non_blocking=like.is_cuda)
