# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MedMNIST quick start
#
# One callback and two method calls give every augmented row of a training batch a learned sample
# weight and a learned soft label (SAFLEX, Ding et al. 2024). Here: a ResNet-18 on 1,200 real
# microscope images of single blood cells (BloodMNIST, CC BY 4.0; they ship with the package) with
# RandAugment as the upstream augmentation. No download.

# %%
import lightning as L
import matplotlib.pyplot as plt
import torch
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18
from torchvision.utils import make_grid

from saflex_lightning import SAflexCallback, SAflexMixin
from saflex_lightning.recipes import MedMNISTDataModule

# %% [markdown]
# About four minutes on two CPU cores; lower `max_epochs` for a first look.

# %% tags=["parameters"]
max_epochs = 10
batches_per_epoch = 18  # all there are
batch_size = 64  # clean rows; as many augmented rows come on top
eval_batches = 1.0  # share, or number, of the validation and test batches that are scored
seed = 1

# %% [markdown]
# ## The augmented batch
#
# A union batch holds clean rows and, behind them, one augmented row for each. `AugmentedBatch`
# says which is which, so that only the augmented rows are refined.

# %%
data = MedMNISTDataModule(augmentation="randaugment", batch_size=batch_size, seed=seed)
data.setup("fit")
batch = next(iter(data.train_dataloader()))
print(f"{len(batch.target)} rows, {int(batch.augmented.sum())} of them augmented")


def show_rows(images, title):
    grid = make_grid(images, nrow=8, normalize=True, value_range=(-1, 1))
    _, axes = plt.subplots(figsize=(8, len(images) / 8))
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_title(title)
    axes.axis("off")


augmented = batch.augmented.nonzero().flatten()[:8]
clean = batch.source[augmented]
show_rows(batch.inputs[torch.cat([clean, augmented])], "clean rows, the same by RandAugment")

# %% [markdown]
# ## The module
#
# `self(x)` becomes `self.saflex_forward(x)` and `F.cross_entropy` becomes `self.saflex_loss`.
# Without the callback they are exactly those two, so the same module is its own baseline.


# %%
class Classifier(SAflexMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = resnet18(num_classes=8)
        self.accuracy = MulticlassAccuracy(8, average="micro")

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        self.last_batch = batch
        return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)

    def validation_step(self, batch, batch_idx):
        images, target = batch
        self.accuracy(self(images), target)
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(*callbacks):
    L.seed_everything(seed, verbose=False)
    model = Classifier()
    trainer = L.Trainer(
        max_epochs=max_epochs,
        limit_train_batches=batches_per_epoch,
        limit_val_batches=eval_batches,
        limit_test_batches=eval_batches,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    metrics = dict(trainer.callback_metrics)
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["accuracy"]
    return model, accuracy, metrics


# %% [markdown]
# ## With and without the callback
#
# The validation split steers: the datamodule's `saflex_dataloader()` hands it to the callback.
# Nothing is selected on it here.

# %%
_, plain_accuracy, _ = train()
model, saflex_accuracy, metrics = train(SAflexCallback())
print(f"test accuracy, the same rows with weight 1: {plain_accuracy:.1%}")
print(f"test accuracy, SAFLEX:                      {saflex_accuracy:.1%}")

# %% [markdown]
# One seed does not rank two methods: see the README for the numbers over seeds, and for where it
# does not help.
#
# ## What was learned
#
# The callback logs how much of the augmented rows it kept, how many labels it changed and how
# uneven the weights are; `model.saflex_solution` holds weights and soft labels of the last batch.

# %%
for name in ("kept_fraction", "relabelled_fraction", "effective_fraction"):
    print(f"{name:20s} {metrics[f'saflex/{name}']:.3f}")

# %% [markdown]
# The eight augmented images with the lowest weights, then the eight with the highest:

# %%
batch, weights = model.last_batch, model.saflex_solution.weights
augmented = batch.augmented.nonzero().flatten()
order = augmented[weights[augmented].argsort()]
shown = torch.cat([order[:8], order[-8:]])
title = f"weights {weights[order[0]]:.2f} and up, weights up to {weights[order[-1]]:.2f}"
show_rows(batch.inputs[shown], title)
