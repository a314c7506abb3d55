"""Fine-tune the image tower of a two-tower model behind a linear head, ready for SAFLEX."""

from typing import Any

from torch import Tensor, nn

from saflex_lightning import AugmentedBatch, SAflexMixin
from saflex_lightning.data.checks import check
from saflex_lightning.recipes.contrastive.encoders import check_encoders
from saflex_lightning.recipes.contrastive.metrics import make_stage_metrics
from saflex_lightning.recipes.contrastive.probe import ImageTower
from saflex_lightning.recipes.contrastive.tower_module import TowerModule, check_rates
from saflex_lightning.recipes.sized import SizedModule

__all__ = ["TowerClassifier"]


class TowerClassifier(SAflexMixin, SizedModule, TowerModule):
    """Image tower and linear head, trained on cross-entropy: the rival of `ContrastiveTuner`.

    With `FitHeadFirst` this is LP-FT: the head is fitted on fixed features, then all is
    fine-tuned. Optimizer, schedule and metrics are those of `ContrastiveTuner`, so that their
    rows can stand in one table; `recipes.Classifier` has others to choose from.

    Args:
        encoders: Both towers, see `ImageTextEncoders`; what the text side alone uses stays as it
            is.
        num_classes: Number of classes; None asks the datamodule's ``sizes()``.
        lr: Largest learning rate of AdamW.
        weight_decay: Of AdamW, decoupled.
        warmup_steps: Optimizer steps in which the rate rises; see `make_warm_up_adamw`.

    Raises:
        TypeError: If ``encoders`` lacks a part of `ImageTextEncoders`, or a setting is of another
            type.
        ValueError: If a setting is out of its range.

    References:
        Kumar et al. 2022 (LP-FT); Ding et al. 2024, Table 4.
    """

    def __init__(
        self,
        encoders: nn.Module,
        num_classes: int | None = None,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.2,
        warmup_steps: int = 500,
    ) -> None:
        super().__init__()
        check_encoders(encoders)
        check("a positive integer", optional=True, num_classes=num_classes)
        check_rates(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps)
        self.save_hyperparameters(ignore=["encoders"])
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.encoders = encoders
        if num_classes is not None:
            self.build({"num_classes": num_classes})

    def make_layers(self, sizes: dict[str, Any]) -> None:
        """Put a head behind the image tower."""
        self.num_classes: int = sizes["num_classes"]
        self.network = ImageTower(self.encoders, self.num_classes)
        del self.encoders  # the network has them
        self.metrics = make_stage_metrics(self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images in [-1, 1], ``(batch, classes)``."""
        return self.network(images)

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        """Return the SAFLEX loss, or plain cross-entropy without the callback."""
        loss = self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)
        self.log("train/loss", loss, prog_bar=True)
        return loss
