"""A small two-tower module, and pairs whose second half is a function of the first."""

import lightning.pytorch as pl
import torch
from helpers.training import NUM_CLASSES, NUM_FEATURES
from torch import nn

from saflex_lightning import SAflexMixin, gather_rows
from saflex_lightning.functional import contrastive_scores


class TwoTowers(SAflexMixin, pl.LightningModule):
    """Match each row with its mirror image; ``gather`` compares it with those of all ranks.

    ``steering="pairs"`` steers by the contrastive loss of validation pairs, ``"classes"`` by a
    classification of the first tower's features against learned prototypes.
    """

    def __init__(self, *, dtype=torch.float32, gather=False, steering="pairs", lr=0.1):
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 6, dtype=dtype)
        self.second = nn.Linear(NUM_FEATURES, 6, dtype=dtype)
        self.prototypes = nn.Parameter(torch.randn(NUM_CLASSES, 6, dtype=dtype))
        self.gather = gather_rows if gather else None
        self.steering, self.lr = steering, lr

    def saflex_scores(self, rows, mirrored=None):
        if mirrored is None:
            return self.first(rows) @ self.prototypes.T
        first, second = self.first(rows), self.second(mirrored) + self.prototypes.mean(0)
        return contrastive_scores(first, second, 5.0, gather=self.gather)

    def saflex_val_batch(self, batch):
        rows, target = batch[:2]
        return ((rows, rows.flip(-1)), None) if self.steering == "pairs" else (rows, target)

    def training_step(self, batch, batch_idx):
        scores = self.saflex_forward(batch[0], batch[0].flip(-1))
        loss = self.saflex_loss(scores)
        self.scores = scores
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
