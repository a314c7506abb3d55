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
# # Quick start: training on labels of which 40 % are wrong
#
# This is what `saflex-train` runs, cell by cell: 1,200 microscope images of single blood cells
# (BloodMNIST, CC BY 4.0; they ship with the package), a small CNN, random crops. 40 % of the
# training labels are wrong on purpose. The 400 validation labels are right, and teach SAFLEX which
# training rows to believe. Nothing is downloaded.

# %%
import csv
import json
import logging
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning.cli.train import train
from saflex_lightning.recipes.medmnist import read_medmnist

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # fewer lines about the device

# %% [markdown]
# About two minutes on two CPU cores. `overrides` takes what the command line of `saflex-train`
# takes, `trainer.max_epochs=10` for a first look.

# %% tags=["parameters"]
overrides = ["seed=1", "trainer.enable_progress_bar=false"]
methods = ["no_aug", "upstream", "label_smoothing", "saflex_robust"]
folder = Path("outputs/quickstart")


# %%
def configure(method):
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        own = [f"method={method}", f"output_dir={folder / method}"]
        return compose("train", overrides=[*overrides, *own])


# %% [markdown]
# ## The rows
#
# Twelve training images. A red title is a wrong label, with the right one in brackets. Training
# sees the given label alone.

# %%
truth = read_medmnist()["train"]
data = instantiate(configure("saflex_robust").data)
data.setup("fit")
names = list(data.saflex_class_names())
is_wrong = data.wrong_rows()[: len(truth.target)]
given = data.make_splits().train.target


def show(rows, titles, colors):
    _, axes = plt.subplots(2, 6, figsize=(12, 4.6))
    for ax, row, title, color in zip(axes.flat, rows, titles, colors, strict=True):
        ax.imshow(truth.images[row].permute(1, 2, 0).numpy())
        ax.set_title(title, color=color, fontsize=8)
    for ax in axes.flat:
        ax.axis("off")


def title_of(row):
    right = names[truth.target[row]]
    return f"{names[given[row]]}\n({right})" if is_wrong[row] else f"{right}\n"


first = range(12)
show(first, map(title_of, first), ["crimson" if is_wrong[row] else "black" for row in first])
print(f"{int(is_wrong.sum())} of {len(given)} training labels are wrong")

# %% [markdown]
# ## Four ways to train on the same rows
#
# `no_aug` trains on the images as they are, `upstream` is the plain pipeline with crops,
# `label_smoothing` the same with smoothed labels, `saflex_robust` the same with `SAflexCallback`.
# All have the same seed, network, number of steps and rows.
#
# Only the last one uses the validation labels. That is its price: where nothing is wrong it is
# better to train on these rows too (docs/accuracy.md has the numbers).

# %%
results = {}
for method in methods:
    results[method] = train(configure(method), table=False)

# %%
print(f"{'method':<17}{'test accuracy':>14}{'test AUROC':>12}")
for method, result in results.items():
    print(f"{method:<17}{100 * result['test_accuracy']:>14.1f}{result['test_auroc']:>12.4f}")
_, ax = plt.subplots(figsize=(6, 2.2))
accuracy = [100 * result["test_accuracy"] for result in results.values()]
colors = ["#9aa5b1"] * (len(methods) - 1) + ["#1f77b4"]
ax.bar_label(ax.barh(methods, accuracy, color=colors), fmt="%.1f", padding=3)
ax.set(xlabel="test accuracy, %", xlim=(0, 100))
ax.invert_yaxis()

# %% [markdown]
# One seed does not rank methods that lie close together. The README has three seeds of larger
# benches, and docs/accuracy.md the ones where nothing is gained.
#
# ## What was learned about the rows
#
# `SAflexInsight` wrote a line for each row: the given label, the suggested one, how far the given
# one is believed, and the mean weight in the loss. Nobody told it which labels are wrong.

# %%
with (folder / "saflex_robust" / "saflex_rows.csv").open() as file:
    rows = [row for row in csv.DictReader(file) if row["belief"]]
position = np.array([int(row["index"]) for row in rows]) % len(given)
belief = np.array([float(row["belief"]) for row in rows])
wrong = is_wrong[position].numpy()
auroc = binary_auroc(given.new_tensor(belief, dtype=float), given.new_tensor(~wrong)).item()

_, ax = plt.subplots(figsize=(6, 2.8))
for group, color, label in ((~wrong, "#1f77b4", "right label"), (wrong, "crimson", "wrong label")):
    ax.hist(belief[group], bins=np.linspace(0, 1, 31), color=color, alpha=0.6, label=label)
ax.set(xlabel="belief in the given label", ylabel="training rows")
ax.set_title(f"wrong and right labels, AUROC {auroc:.3f}")
ax.legend()
print(json.dumps(rows[0], indent=1))

# %% [markdown]
# The twelve rows that are doubted most, with given → suggested label; green where the suggestion is
# right. In a project of your own this is the list to look through first.

# %%
doubted = position[:12]
suggested = [names.index(row["suggested"]) for row in rows]
titles = [
    f"{names[given[row]]}\n→ {names[suggestion]}"
    for row, suggestion in zip(doubted, suggested, strict=False)
]
is_right = [
    suggestion == truth.target[row] for row, suggestion in zip(doubted, suggested, strict=False)
]
show(doubted, titles, ["green" if right else "crimson" for right in is_right])
share = np.mean([int(truth.target[row]) for row in position[wrong]] == np.array(suggested)[wrong])
print(
    f"{sum(map(bool, is_right))} of these 12 suggestions are right; of all wrong labels {share:.0%}"
)

# %% [markdown]
# ## Weights against the truth
#
# Mean weight and share of wrong labels of the rows, from the least to the most believed tenth.

# %%
weight = np.array([float(row["mean_weight"]) for row in rows])
tenths = np.array_split(np.arange(len(rows)), 10)  # rows are sorted by belief
_, ax = plt.subplots(figsize=(6, 2.8))
ax.plot([weight[tenth].mean() for tenth in tenths], "o-", color="#1f77b4", label="mean weight")
ax.plot(
    [wrong[tenth].mean() for tenth in tenths], "o-", color="crimson", label="share of wrong labels"
)
ax.set(xlabel="tenth of the training rows, least believed first", ylim=(0, None))
_ = ax.legend()

# %% [markdown]
# ## In your own module
#
# ```diff
# -trainer = L.Trainer(max_epochs=30)
# +trainer = L.Trainer(max_epochs=30, callbacks=[SAflexCallback(), SAflexInsight()])
# ```
#
# `saflex-report outputs/quickstart/saflex_robust` makes a page of this run. docs/how-to says how
# text, graphs, audio and library modules are trained so.
