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
# # Purifying a pool of generated images
#
# A generator makes images that look almost right: some are blurred, some show no class at all.
# Trained on as they are, they help or harm as luck has it. Here a small class-conditional
# variational autoencoder is trained on 1,200 real images of blood cells, its samples become a pool,
# and SAFLEX learns, image by image, how much of it to believe.
#
# The same for a diffusion model: make the pool with `saflex-generate diffusion`.

# %%
import tempfile
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
from torchvision.utils import make_grid

from saflex_lightning import SAflexCallback
from saflex_lightning.recipes import Classifier, GeneratedDataModule, ResNet18
from saflex_lightning.recipes.medmnist_folders import write_medmnist_folders
from saflex_lightning.recipes.vae import fill_pool_by_vae

# %% [markdown]
# Smaller numbers give a first look.

# %% tags=["parameters"]
file = None  # a MedMNIST file; None is the BloodMNIST subset that ships with the package
vae_epochs = 100
strengths = [0.3, 0.6, 1.0]  # how far a sample is from the image it was made from; 1: anything goes
max_epochs = 10
batch_size = 64
seed = 1

# %% [markdown]
# ## The pool
#
# Real images as class folders, and one sample of each at each strength. The manifest beside the
# samples tells class, source and generator.

# %%
folder = Path(tempfile.mkdtemp())
write_medmnist_folders(str(folder / "real"), path=file)
fill_pool_by_vae(
    str(folder / "real" / "train"),
    str(folder / "pool"),
    strengths=strengths,
    epochs=vae_epochs,
    seed=seed,
)
print((folder / "pool" / "manifest.csv").read_text()[:250])


# %%
def make_data(augmentation):
    data = GeneratedDataModule(
        str(folder / "real"),
        str(folder / "pool"),
        image_size=None,
        per_class="real",  # in each epoch one generated image for each real one
        redraw=True,
        augmentation=augmentation,
        batch_size=batch_size,
        seed=seed,
    )
    data.setup("fit")
    return data


def show(images, title):
    grid = make_grid(images, nrow=8, normalize=True, value_range=(-1, 1))
    _, axes = plt.subplots(figsize=(8, len(images) / 8))
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_title(title)
    axes.axis("off")


data = make_data("generated")
batch = next(iter(data.train_dataloader()))
for group, name in enumerate(data.saflex_group_names()):
    rows = (batch.group == group).nonzero().flatten()[:8]
    if group and len(rows):
        show(batch.inputs[rows], name)

# %% [markdown]
# ## Three runs
#
# Real images alone; real and generated ones with weight 1; the same rows with SAFLEX. Each batch
# holds the real images and what was made from them, so all runs see the same real images and take
# the same number of steps. `AugmentedBatch.index` names an image across epochs: the small callback
# below adds up the weights of each.


# %%
class Evidence(L.Callback):
    def __init__(self, num_images):
        self.total, self.times = torch.zeros(num_images), torch.zeros(num_images)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rows = batch.augmented
        self.total.index_add_(0, batch.index[rows], module.saflex_solution.weights[rows])
        self.times.index_add_(0, batch.index[rows], torch.ones(int(rows.sum())))

    def mean(self):
        return self.total / self.times  # nan where an image was never drawn


def train(augmentation, *callbacks):
    L.seed_everything(seed, verbose=False)
    data = make_data(augmentation)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(ResNet18)  # the data tell it classes and channels
    trainer.fit(model, datamodule=data)
    return trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"]


dataset = data.train_dataloader().dataset
evidence = Evidence(len(dataset))
accuracy = {
    "real images alone": train("none"),
    "all rows with weight 1": train("generated"),
    "SAFLEX": train("generated", SAflexCallback(), evidence),
}
for name, value in accuracy.items():
    print(f"test accuracy, {name:25s} {value:.1%}")

# %% [markdown]
# One seed does not rank methods; `docs/results/0.1/generated_pool_cpu.md` has what was
# measured.
#
# ## What the weights say
#
# By strength, and by image: the images that were trusted least, then those trusted most.

# %%
mean = evidence.mean()
for group, name in enumerate(data.saflex_group_names()):
    if group:
        print(f"{name:20s} mean weight {mean[dataset.group == group].nanmean():.3f}")

# %%
seen = mean.isfinite().nonzero().flatten()
order = seen[mean[seen].argsort()]
shown = [*order[:8].tolist(), *order[-8:].tolist()]
show(dataset[shown].inputs, f"mean weight {mean[order[0]]:.2f} and up; up to {mean[order[-1]]:.2f}")
