"""The score of Table 4, and how a module logs it for rows in and out of distribution."""

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from saflex_lightning.data.checks import check

__all__ = ["MacroF1", "log_stage_metrics", "make_stage_metrics"]

_STAGES = ("val", "test", "test_ood")


class MacroF1(Metric):
    r"""F1 of each class that occurs among the targets, averaged.

    .. math:: F_k = \frac{2\, TP_k}{2\, TP_k + FP_k + FN_k}

    Classes that are predicted but never occur are left out, as WILDS does it for iWildCam, where
    no test split has all 182 classes; `torchmetrics` counts them as 0.

    Args:
        num_classes: Number of classes.

    Raises:
        TypeError: If that is no integer.
        ValueError: If it is not positive.

    Example:
        >>> metric = MacroF1(3)
        >>> metric.update(torch.tensor([0, 2, 1]), torch.tensor([0, 0, 1]))
        >>> metric.compute().round(decimals=4)
        tensor(0.8333)

    References:
        Koh et al. 2021, section E.2 (iWildCam2020-wilds).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    predicted: Tensor
    occurring: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check("a positive integer", num_classes=num_classes)
        self.num_classes = num_classes
        for name in ("correct", "predicted", "occurring"):
            count = torch.zeros(num_classes, dtype=torch.int64)
            self.add_state(name, count, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Count predictions.

        Args:
            predictions: Classes ``(batch,)``, or scores ``(batch, classes)``.
            target: Classes, ``(batch,)`` int64.
        """
        classes = predictions.argmax(-1) if predictions.ndim == 2 else predictions
        self.correct += target[classes == target].bincount(minlength=self.num_classes)
        self.predicted += classes.bincount(minlength=self.num_classes)
        self.occurring += target.bincount(minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Return the mean F1 over classes that occurred, in [0, 1]."""
        occurs = self.occurring > 0
        f1 = 2 * self.correct / (self.predicted + self.occurring).clamp(min=1)
        return (f1 * occurs).sum() / occurs.sum().clamp(min=1)


def make_stage_metrics(num_classes: int) -> nn.ModuleDict:
    """Return accuracy and macro F1 of validation and test rows, in and out of distribution.

    Args:
        num_classes: Number of classes.
    """
    return nn.ModuleDict(
        {
            f"{stage}_{name}": metric
            for stage in _STAGES
            for name, metric in (
                ("accuracy", MulticlassAccuracy(num_classes, average="micro")),
                ("f1", MacroF1(num_classes)),
            )
        }
    )


def log_stage_metrics(
    module: L.LightningModule,
    metrics: nn.ModuleDict,
    stage: str,
    scores: Tensor,
    target: Tensor,
) -> None:
    """Count the rows of a batch and log the metrics of their stage, from a step of a module.

    Args:
        module: The module whose step this is; it holds the metrics.
        metrics: From `make_stage_metrics`.
        stage: ``"val"``, ``"test"`` or, for rows out of distribution, ``"test_ood"``.
        scores: Class scores, ``(batch, classes)``.
        target: Classes, ``(batch,)`` int64.
    """
    for name in ("accuracy", "f1"):
        metric = metrics[f"{stage}_{name}"]
        assert isinstance(metric, Metric)
        metric.update(scores, target)
        module.log(f"{stage}/{name}", metric, prog_bar=name == "f1", add_dataloader_idx=False)
