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
# # Good and bad augmentation in two dimensions
#
# Three classes of points in the plane, few of them clean. The upstream augmentation shifts each
# clean point and keeps its label: half of the shifts are small (good), half carry the point into
# another class (bad). SAFLEX (Ding et al. 2024, Figure 2 shows such a toy) learns a weight and
# a soft label for every augmented point from validation points. An engine, the solve and a loop.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.functional import Settings, solve, weighted_cross_entropy

# %% tags=["parameters"]
steps = 300
shown_steps = (5, 40, 150, 299)
seed = 1
settings = Settings(label_penalty=0.5, temperature=0.5)  # so low that labels visibly move

# %% [markdown]
# ## The points
#
# `true` is the class of the place where a point is, which the training never sees.

# %%
generator = torch.Generator().manual_seed(seed)
CENTRES = 2.0 * torch.tensor([[0.0, 1.0], [0.87, -0.5], [-0.87, -0.5]])


def draw(rows):
    target = torch.arange(rows) % 3
    return CENTRES[target] + 0.6 * torch.randn(rows, 2, generator=generator), target


(clean, clean_target), (val_points, val_target) = draw(30), draw(90)
test_points, test_target = draw(900)

source, source_target = clean.repeat(2, 1), clean_target.repeat(2)
is_bad = torch.arange(60) >= 30
true = torch.where(is_bad, (source_target + 1) % 3, source_target)
shift = CENTRES[true] - CENTRES[source_target]
augmented_points = source + shift + 0.3 * torch.randn(60, 2, generator=generator)

points = torch.cat([clean, augmented_points])
target = torch.cat([clean_target, source_target])
augmented = torch.arange(90) >= 30  # clean points keep weight 1 and their own label

# %% [markdown]
# ## The training
#
# In every step: the validation gradient g, the movement of the scores along -g, the solve, and an
# ordinary step on the weighted soft-label loss. Weights and labels are kept as running averages,
# since those of one step are noisy.


# %%
def val_loss(logits):
    return cross_entropy(logits, val_target)


def train(refine, rows=slice(None)):
    torch.manual_seed(seed)
    hidden = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = make_engine("forward_mode", model)
    weights, labels, history = torch.ones(90), nn.functional.one_hot(target, 3).float(), []
    for _ in range(steps):
        if refine:
            val_gradient = engine.gradient(lambda: model(val_points), val_loss)
            finish = engine.jvp(lambda: model(points), descent_direction(val_gradient))
            logits = model(points)
            jvp = finish.of(logits)  # how the scores move along -g
            solution = solve(jvp, logits.softmax(-1), target, augmented, settings)
            loss = weighted_cross_entropy(logits, solution.soft_labels, solution.weights)
            weights = torch.lerp(weights, solution.weights, 0.1)
            labels = torch.lerp(labels, solution.soft_labels, 0.1)
            history.append((weights, labels))
        else:
            loss = cross_entropy(model(points[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (model(test_points).argmax(-1) == test_target).float().mean().item()
    return accuracy, history


clean_accuracy, _ = train(refine=False, rows=slice(30))
plain_accuracy, _ = train(refine=False)
accuracy, history = train(refine=True)
print(f"test accuracy: clean points alone {clean_accuracy:.1%} (the honest rival here), all points")
print(f"with weight 1 {plain_accuracy:.1%}, SAFLEX {accuracy:.1%}")

# %% [markdown]
# ## Weights and labels over the training
#
# Squares are clean points. A circle is an augmented point: its area is its weight, its colour the
# mixture of its soft label, its rim the colour of the label it was given.

# %%
COLOURS = torch.tensor([[0.84, 0.19, 0.15], [0.10, 0.59, 0.25], [0.13, 0.40, 0.80]])

figure, panels = plt.subplots(1, len(shown_steps), figsize=(4 * len(shown_steps), 4))
for panel, step in zip(panels, shown_steps, strict=True):
    weights, labels = history[step]
    panel.set(title=f"step {step}", aspect="equal")
    panel.scatter(*clean.T, c=COLOURS[clean_target].numpy(), marker="s", s=25)
    panel.scatter(
        *augmented_points.T,
        s=60 * weights[augmented],
        c=(labels[augmented] @ COLOURS).clamp(0, 1).numpy(),
        edgecolors=COLOURS[source_target].numpy(),
        linewidths=2,
    )

# %% [markdown]
# Good points against bad ones: the weight, and the mass of the soft label on the true class.

# %%
rows = torch.arange(60)
series = {
    "sample weight": torch.stack([weights[augmented] for weights, _ in history]),
    "mass on the true class": torch.stack([labels[augmented][rows, true] for _, labels in history]),
}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
for panel, (title, values) in zip(panels, series.items(), strict=True):
    panel.plot(values[:, ~is_bad].mean(1), label="good points")
    panel.plot(values[:, is_bad].mean(1), label="bad points")
    panel.set(title=title, xlabel="step")
    panel.legend()
