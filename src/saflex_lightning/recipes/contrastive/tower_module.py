"""What the modules on an image tower share: evaluation by macro F1, and AdamW with a warm-up."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.contrastive.metrics import log_stage_metrics
from saflex_lightning.recipes.contrastive.schedule import make_warm_up_adamw

__all__ = ["TowerModule", "check_rates"]


def check_rates(*, lr: Any, weight_decay: Any, warmup_steps: Any) -> None:
    """Refuse settings of AdamW and its warm-up that are of another type or out of range."""
    check("a non-negative number", lr=lr, weight_decay=weight_decay)
    check("a non-negative integer", warmup_steps=warmup_steps)


class TowerModule(L.LightningModule):
    """Validation and test steps that log accuracy and macro F1, and the optimizer."""

    metrics: nn.ModuleDict
    lr: float
    weight_decay: float
    warmup_steps: int

    def class_scores(self, images: Tensor) -> Tensor:
        """Return what is evaluated, ``(batch, classes)``."""
        return self(images)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracy and macro F1 of the validation rows."""
        self._evaluate("val", batch)

    def test_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log accuracy and macro F1; a second test loader holds the rows out of distribution."""
        self._evaluate("test" if dataloader_idx == 0 else "test_ood", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        log_stage_metrics(self, self.metrics, stage, self.class_scores(images), labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with its warm-up and half cosine, stepped once per optimizer step."""
        return make_warm_up_adamw(
            self, lr=self.lr, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps
        )
