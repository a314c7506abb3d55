"""Modules that nobody edited."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from helpers.training import NUM_CLASSES, Classifier, make_net
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0])


class Unedited(pl.LightningModule):
    """`helpers.training.Classifier` before anybody put the mixin into it."""

    def __init__(self, *, plain=False, dtype=torch.float32, optimizer="adam", lr=1e-2):
        super().__init__()
        self.net = make_net(plain=plain, dtype=dtype)
        self.optimizer_name, self.lr = optimizer, lr
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    forward = Classifier.forward
    configure_optimizers = Classifier.configure_optimizers

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        loss = F.cross_entropy(self(inputs), target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, target = batch
        logits = self(inputs)
        self.accuracy(logits, target)
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", F.cross_entropy(logits, target))

    test_step = validation_step


class UneditedWeighted(Unedited):
    """Label smoothing and class weights, in a criterion that is a module."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.criterion = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return {"loss": self.criterion(self(inputs), target)}


class EditedWeighted(Classifier):
    """The same with the mixin."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.criterion = nn.CrossEntropyLoss(weight=WEIGHT)  # a buffer, as there

    def training_step(self, batch, batch_idx):
        logits = self.saflex_forward(batch[0])
        return self.saflex_loss(logits, batch[1], class_weight=WEIGHT, label_smoothing=0.1)
