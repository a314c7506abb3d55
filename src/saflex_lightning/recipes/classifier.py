"""The LightningModule that trains the classifiers of every recipe."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from saflex_lightning import AugmentedBatch, SAflexCallback, SAflexMixin
from saflex_lightning.data.checks import check
from saflex_lightning.recipes.network import Network, NetworkMaker, plain
from saflex_lightning.recipes.optimizer import (
    OptimizerName,
    Schedule,
    learning_rate_factor,
    make_optimizer,
)
from saflex_lightning.recipes.sized import SizedModule
from saflex_lightning.recipes.small_loss import small_loss

__all__ = ["Classifier", "balanced_class_weight"]

Batch = AugmentedBatch | tuple[Any, Tensor]


def balanced_class_weight(class_counts: Tensor) -> Tensor:
    """Return weights that give every class the same share of the loss.

    A row of class k weighs n / (K n_k), so the rows of a training epoch weigh 1 on average. A
    class without rows is weighted as if it had one.

    Args:
        class_counts: Training rows of each class, ``(classes,)``.

    Returns:
        ``(classes,)`` float32, positive.

    Example:
        >>> balanced_class_weight(torch.tensor([30, 10]))
        tensor([0.6667, 2.0000])
    """
    return class_counts.sum() / (len(class_counts) * class_counts.clamp(min=1).float())


class Classifier(SAflexMixin, SizedModule):
    """A network trained on (weighted, soft-label) cross-entropy, ready for SAFLEX.

    Without `SAflexCallback` it trains on plain cross-entropy. It logs accuracy, AUROC (macro, one
    against the rest; for two classes that is the binary AUROC) and F1 (macro, over the classes that
    occur among labels or predictions) of the validation and test rows, and the plain cross-entropy
    of the validation rows.

    Args:
        network: From inputs to logits, ``(batch, classes)``; inputs that are a tuple or list of
            tensors (numeric and categorical columns) are passed one by one. A network that is
            ready, or what makes one once the datamodule's ``sizes()`` are known: a class such as
            `ResNet18`, its import path, a ``functools.partial`` of it, or a mapping of ``class``,
            the import path, and of settings.
        num_classes: Number of classes; None asks the datamodule.
        optimizer: See `make_optimizer`.
        lr: Learning rate of the first epoch.
        weight_decay: See `make_optimizer`.
        momentum: See `make_optimizer`.
        schedule: See `learning_rate_factor`; stepped once per epoch.
        class_weight: Weight of each class in the loss; ``"balanced"`` asks the datamodule's
            ``class_counts()`` and weighs by `balanced_class_weight`; None weighs all alike.
        label_smoothing: In [0, 1).
        dropped_share: Share of the augmented rows of a batch that the small-loss filter drops, see
            `small_loss_weights`; a rival to `SAflexCallback` and not to be used beside it. 0 drops
            none.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of range.

    Example:
        >>> from saflex_lightning.recipes import MedMNISTDataModule, SmallCNN
        >>> model, data = Classifier(SmallCNN, lr=0.01), MedMNISTDataModule()
        >>> data.setup("fit")
        >>> model.build(data.sizes())  # a Trainer does
        >>> model.num_classes
        8
    """

    class_weight: Tensor | None
    network: nn.Module

    def __init__(
        self,
        network: Network,
        num_classes: int | None = None,
        *,
        optimizer: OptimizerName = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        schedule: Schedule = "cosine",
        class_weight: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        dropped_share: float = 0.0,
    ) -> None:
        super().__init__()
        check("a positive integer", optional=True, num_classes=num_classes)
        check(get_args(OptimizerName), optimizer=optimizer)
        check(get_args(Schedule), schedule=schedule)
        check("a non-negative number", lr=lr, weight_decay=weight_decay)
        check("a number in [0, 1)", momentum=momentum, label_smoothing=label_smoothing)
        check("a number in [0, 1)", dropped_share=dropped_share)
        network, class_weight = plain(network), plain(class_weight)
        _check_class_weight(class_weight)
        # A network that is named can be made again from a checkpoint alone.
        is_named = isinstance(network, (str, dict))
        self.save_hyperparameters(ignore=[] if is_named else ["network"])
        self.optimizer: OptimizerName = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule: Schedule = schedule
        self.balanced = class_weight == "balanced"
        self.label_smoothing = label_smoothing
        self.dropped_share = dropped_share
        self._given_weight, self._given_classes = class_weight, num_classes
        if isinstance(network, nn.Module):
            self.network = network
            if num_classes is not None:
                self.build({"num_classes": num_classes})
        else:
            self._maker = NetworkMaker.read(network)

    def make_layers(self, sizes: dict[str, Any]) -> None:
        """Make the network, if it is not ready, the class weights and the metrics."""
        num_classes = sizes["num_classes"]
        if self._given_classes not in (None, num_classes):
            raise ValueError(
                f"Expected `num_classes` to be {num_classes}, as the data have, but got "
                f"{self._given_classes}. Leave it out: the data tell."
            )
        self.num_classes: int = num_classes
        if not hasattr(self, "network"):
            self.network = self._maker.build(sizes)
        # Not in checkpoints: the settings and the datamodule make it anew.
        self.register_buffer("class_weight", None, persistent=False)
        if isinstance(self._given_weight, list):
            _check_class_weight(self._given_weight, num_classes)
            self.class_weight = torch.tensor(self._given_weight, dtype=torch.float32)
        self.val_metrics = _make_metrics(num_classes)
        self.test_metrics = _make_metrics(num_classes)

    def setup(self, stage: str) -> None:
        """Refuse a second thing that weighs rows beside the small-loss filter.

        Raises:
            MisconfigurationException: If both it and `SAflexCallback` would weigh the rows.
        """
        callbacks = self.trainer.callbacks if stage == "fit" else []  # type: ignore[attr-defined]
        if self.dropped_share and any(isinstance(each, SAflexCallback) for each in callbacks):
            raise MisconfigurationException(
                f"Expected `dropped_share` to be 0 beside `SAflexCallback`, but got "
                f"{self.dropped_share}: both would weigh the rows. Leave one of them out."
            )

    def on_fit_start(self) -> None:
        """Ask the datamodule for the class counts, where the class weights follow from them.

        Raises:
            MisconfigurationException: If it has no ``class_counts()``.
        """
        if not self.balanced:
            return
        count = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
        if count is None:
            raise MisconfigurationException(
                "Expected the datamodule to have a method `class_counts()` with "
                "`class_weight`='balanced', but there is none. Add one that returns the training "
                f"rows of each of the {self.num_classes} classes, or pass a list of weights."
            )
        self.class_weight = balanced_class_weight(count()).to(self.device)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``."""
        return self.network(*inputs)

    def saflex_val_batch(self, batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs one by one, and the target."""
        return _as_tuple(batch[0]), batch[1]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the SAFLEX loss; without the callback cross-entropy, filtered where asked for."""
        inputs, target = _as_tuple(batch[0]), batch[1]
        options: Any = {
            "class_weight": self.class_weight,
            "label_smoothing": self.label_smoothing,
        }
        if self.dropped_share:
            every = torch.ones(len(target), dtype=torch.bool, device=target.device)
            mask = batch.augmented if isinstance(batch, AugmentedBatch) else every
            share = self.dropped_share
            loss = small_loss(self(*inputs), target, mask, dropped_share=share, **options)
        else:
            loss = self.saflex_loss(self.saflex_forward(*inputs), target, **options)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Log the plain cross-entropy and the metrics of the validation rows."""
        inputs, target = batch
        logits = self(*_as_tuple(inputs))
        self.log("val/loss", F.cross_entropy(logits, target))
        self._log_metrics("val", self.val_metrics, logits, target)

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Log the metrics of the test rows."""
        inputs, target = batch
        self._log_metrics("test", self.test_metrics, self(*_as_tuple(inputs)), target)

    def _log_metrics(
        self, stage: str, metrics: nn.ModuleDict, logits: Tensor, target: Tensor
    ) -> None:
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(logits.softmax(-1), target)  # of logits torchmetrics guesses by range
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule.

        Raises:
            MisconfigurationException: If the schedule needs the number of epochs and the Trainer
                has none.
        """
        optimizer = make_optimizer(
            self.optimizer,
            self.parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )
        max_epochs = self.trainer.max_epochs or -1
        if self.schedule != "constant" and max_epochs < 1:
            raise MisconfigurationException(
                f"Expected the Trainer's `max_epochs` to be positive with `schedule`="
                f"'{self.schedule}', but got {max_epochs}. Set `max_epochs`, or pass "
                "`schedule`='constant'."
            )
        scheduler = LambdaLR(
            optimizer, lambda epoch: learning_rate_factor(self.schedule, epoch, max_epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _make_metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "auroc": MulticlassAUROC(num_classes, average="macro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    )


def _as_tuple(inputs: Any) -> tuple[Tensor, ...]:
    # A loader's own collation makes lists of tuples.
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _check_class_weight(class_weight: Any, num_classes: int | None = None) -> None:
    """Refuse what is neither None, 'balanced' nor a list of weights, one per class if told."""
    if class_weight is None or class_weight == "balanced":
        return
    weights = class_weight if isinstance(class_weight, list) else [None]
    fits = num_classes in (None, len(weights)) and all(map(_is_weight, weights))
    if not fits:
        wanted = "" if num_classes is None else f"{num_classes} "
        raise ValueError(
            f"Expected `class_weight` to be None, 'balanced' or a list of {wanted}non-negative "
            f"numbers, but got {class_weight!r}. Pass one weight per class."
        )


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
