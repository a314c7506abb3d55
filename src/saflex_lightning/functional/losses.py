"""Cross-entropy per sample, with labels that may be learned, and the checks of its target."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .contrastive import contrastive_target

__all__ = [
    "NO_OPTIONS",
    "LossOptions",
    "Scores",
    "as_tuple",
    "check_target",
    "check_tasks",
    "dense_target",
    "is_probabilities",
    "looking_is_free",
    "map_scores",
    "mean_cross_entropy",
    "weighted_cross_entropy",
    "widen",
]


Scores = Tensor | tuple[Tensor, ...]


def as_tuple(scores: Any) -> tuple[Tensor, ...]:
    """Return scores as a tuple of tasks.

    Raises:
        TypeError: If they are something else.
    """
    tasks = (scores,) if isinstance(scores, Tensor) else scores
    are_tensors = isinstance(tasks, (tuple, list)) and all(isinstance(t, Tensor) for t in tasks)
    if not are_tensors or not tasks:
        kinds = [type(task).__name__ for task in tasks]
        inside = f" of {kinds}" if isinstance(tasks, (tuple, list)) else ""
        raise TypeError(
            "Expected scores that are a tensor of shape (batch, classes), or a tuple of such, but "
            f"got {type(scores).__name__}{inside}. Override `saflex_scores` to return the logits "
            "alone."
        )
    return tuple(tasks)


def map_scores(function: Callable[..., Tensor], *scores: Scores) -> Scores:
    """Apply a function to a score tensor, or to each task of tuples of them."""
    if isinstance(scores[0], Tensor):
        return function(*scores)
    return tuple(function(*tasks) for tasks in zip(*scores, strict=True))


def is_probabilities(scores: Tensor) -> bool:
    """Say whether scores of two classes or more look like probabilities; waits for the device."""
    wide = scores.detach().float()
    sums = wide.sum(-1)
    positive = bool((wide >= 0).all()) and wide.ndim > 1 and wide.shape[-1] > 1
    return positive and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)


class LossOptions(NamedTuple):
    """Options of the training loss that the validation gradient shares.

    Attributes:
        class_weight: ``(classes,)`` or None.
        label_smoothing: In [0, 1).
    """

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def same_kind(self, other: "LossOptions") -> bool:
        """Say whether a gradient made with one serves the other."""
        return (self.class_weight is None) == (other.class_weight is None) and (
            bool(self.label_smoothing) == bool(other.label_smoothing)
        )

    def to(self, device: torch.device) -> "LossOptions":
        """Return the options with the class weights on a device."""
        weight = None if self.class_weight is None else self.class_weight.to(device)
        return self._replace(class_weight=weight)


NO_OPTIONS = LossOptions()


def looking_is_free(device: torch.device) -> bool:
    """Say whether a look at values waits for no device that works through its queue."""
    return device.type == "cpu"


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense_target(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return ``(batch,)`` labels or ``(batch, classes)`` probabilities as the latter."""
    if target.ndim == 1:
        labels = torch.zeros(len(target), num_classes, dtype=dtype, device=target.device)
        return labels.scatter_(1, target.long().unsqueeze(1), 1)
    return target.to(dtype)


def weighted_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Tensor,
    weights: Float[Tensor, " batch"],
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    label_smoothing: float = 0.0,
    total: Tensor | None = None,
) -> Tensor:
    r"""Return the weighted mean cross-entropy of samples with label distributions of their own.

    .. math:: L = \frac{1}{W} \sum_i -w_i
        \sum_k c_k \big((1 - \epsilon)\, y_{ik} + \epsilon / K\big) \log p_{ik}

    Args:
        logits: Model scores, ``(batch, classes)``.
        labels: Label distributions y, ``(batch, classes)``, whose rows sum to 1; or classes,
            ``(batch,)`` integers.
        weights: Sample weights w, ``(batch,)``, non-negative.
        class_weight: c, ``(classes,)``; None means 1 for every class.
        label_smoothing: epsilon, in [0, 1).
        total: W, scalar; None means the sum of the weights.

    Returns:
        Scalar in nats, float32 or wider; zero, and connected to the logits, where W is zero.

    Example:
        >>> logits, labels = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]])
        >>> weighted_cross_entropy(logits, labels, torch.ones(1)).round(decimals=4)
        tensor(0.6931)

    References:
        Ding et al. 2024, Eq. 1 (the loss whose weights and labels are learned).
    """
    log_p = torch.log_softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))
    if class_weight is not None:
        class_weight = class_weight.to(log_p)
    total = weights.sum() if total is None else total
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    if labels.ndim == 1 and not label_smoothing:
        losses = torch.nn.functional.nll_loss(log_p, labels.long(), class_weight, reduction="none")
        losses = losses.masked_fill(weights == 0, 0)  # infinite ones too
        return (weights * losses).sum() / total
    labels = dense_target(labels, log_p.shape[-1], log_p.dtype)
    if label_smoothing:
        labels = (1 - label_smoothing) * labels + label_smoothing / labels.shape[-1]
    if class_weight is not None:
        labels = labels * class_weight
    # A class that a score of minus infinity rules out costs nothing without a label or a weight.
    labels = labels * weights.unsqueeze(1)
    return (labels * log_p.masked_fill(labels == 0, 0)).sum() / -total


def mean_cross_entropy(
    logits: Scores,
    target: Tensor | None,
    options: LossOptions = NO_OPTIONS,
    *,
    check: Literal["nothing", "shapes", "values"] = "nothing",
) -> Tensor:
    """Return ``F.cross_entropy``, averaged over tasks when the scores are a tuple.

    Without a target it is that of contrastive scores. Labels may be of any integer type, of which
    ``F.cross_entropy`` takes two. To ``check`` a target's values waits for the device.
    """
    tasks = as_tuple(logits)
    if target is not None:
        check_tasks(tasks)
        for number, scores in enumerate(tasks if check != "nothing" else ()):
            check_target(target, scores, values=check == "values" and number == 0)
        target = target if target.is_floating_point() else target.long()
    weight = options.class_weight
    losses = [
        torch.nn.functional.cross_entropy(
            scores,
            contrastive_target(scores) if target is None else target,
            weight=None if weight is None else weight.to(scores.dtype),
            label_smoothing=options.label_smoothing,
        )
        for scores in tasks
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def check_tasks(tasks: Sequence[Tensor]) -> None:
    """Refuse tasks of one target that are scored over different classes."""
    if len({scores.shape[-1] for scores in tasks if scores.ndim}) > 1:
        raise ValueError(
            "Expected every score tensor to have the classes of the one target, but got shapes "
            f"{[tuple(scores.shape) for scores in tasks]}, as of heads with label spaces of their "
            "own, or of logits beside features. Override `saflex_scores` to return the logits that "
            "SAFLEX refines."
        )


def check_target(target: Tensor, logits: Tensor, *, values: bool = True) -> None:
    """Refuse a target that does not fit classification scores, ``(batch, classes)``.

    Looking at ``values`` too, and not at shapes and types alone, waits for the device.
    """
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[-1] == 1 < len(logits)):
        raise ValueError(
            f"Expected `logits` with a score for each class, but got shape {tuple(logits.shape)}, "
            "as of a binary head with one logit. Give the model two logits, and integer labels."
        )
    if logits.ndim != 2 or logits.shape[-1] < 1:
        raise ValueError(
            f"Expected `logits` of shape (batch, classes), but got {tuple(logits.shape)}. "
            "SAFLEX serves classification, and no dense targets: bring rows to the first dimension "
            "and classes to the last, or train without SAFLEX."
        )
    batch_size, num_classes = logits.shape
    if target.ndim == 1 and target.is_floating_point():
        raise TypeError(
            f"Expected `target` of shape (batch,) to hold int64 labels, but got {target.dtype}. "
            "Binary cross-entropy targets are not supported; give the model two logits and pass "
            "`target.long()`."
        )
    if target.ndim == 2 and not target.is_floating_point():
        raise TypeError(
            f"Expected `target` of shape (batch, classes) to hold probabilities, but got "
            f"{target.dtype}. Pass class labels of shape (batch,) or `target.float()`."
        )
    if target.shape not in {(batch_size,), (batch_size, num_classes)}:
        raise ValueError(
            f"Expected `target` of shape ({batch_size},) or ({batch_size}, {num_classes}) for "
            f"logits of shape {tuple(logits.shape)}, but got {tuple(target.shape)}. "
            "Check that validation and training data have the same classes."
        )
    if values and target.numel():
        _check_values(target, num_classes)


def _check_values(target: Tensor, num_classes: int) -> None:
    values = widen(target).cpu().numpy() if target.is_floating_point() else target.cpu().numpy()
    low, high = values.min(), values.max()
    if target.ndim == 1 and (low < 0 or high >= num_classes):
        hint = (
            "`ignore_index` is not supported: drop those rows before the loss."
            if low == -100
            else "Check the labels and the model's number of classes."
        )
        raise ValueError(
            f"Expected labels in [0, {num_classes - 1}], but got values from {low} to {high}. "
            f"{hint}"
        )
    if target.ndim == 2:
        sums = values.sum(-1)
        tolerance = 1e-3 + torch.finfo(target.dtype).eps / 2  # entries may have been rounded
        if low < 0 or not np.allclose(sums, 1, rtol=1e-5, atol=tolerance):
            raise ValueError(
                "Expected rows of `target` to be probabilities that sum to 1, but got values from "
                f"{low:.3g} and row sums from {sums.min():.3g} to {sums.max():.3g}. Multi-label "
                "(binary cross-entropy) targets are not supported; normalise the rows."
            )
