"""The small-loss filter against a loop over rows, alone and as a setting of the classifier."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch, SAflexCallback
from saflex_lightning.recipes import Classifier
from saflex_lightning.recipes.small_loss import small_loss, small_loss_weights

ROWS, CLASSES = 24, 4
AUGMENTED = torch.arange(ROWS) % 3 > 0  # 16 of 24


def problem(*, soft=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=generator)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    if soft:
        own = F.one_hot(target, CLASSES).double()
        target = 0.7 * own + 0.3 * own.roll(1, 0)
    return logits, target


def by_loop(logits, target, augmented, share, class_weight, smoothing):
    """The filtered loss and the weights, one row and one class at a time."""
    labels, losses, plain = [], [], []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        given = label if target.ndim == 2 else [float(k == label) for k in range(CLASSES)]
        log_p = [x - math.log(sum(math.exp(z) for z in row)) for x in row]
        smooth = [(1 - smoothing) * y + smoothing / CLASSES for y in given]
        labels.append(given)
        plain.append(-sum(y * x for y, x in zip(given, log_p, strict=True)))
        terms = zip(class_weight, smooth, log_p, strict=True)
        losses.append(-sum(c * y * x for c, y, x in terms))
    rows = [row for row in range(ROWS) if augmented[row]]
    rows.sort(key=lambda row: -plain[row])
    dropped = rows[: math.floor(share * len(rows))]
    kept = len(rows) - len(dropped)
    weights = [1.0 if row not in rows else len(rows) / kept for row in range(ROWS)]
    for row in dropped:
        weights[row] = 0.0
    total = sum(
        weight * (class_weight[labels[row].index(1.0)] if target.ndim == 1 else 1.0)
        for row, weight in enumerate(weights)
    )
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / total, weights


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.99])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"class_weight": True}])
def test_equals_a_loop_over_rows(share, soft, options):
    logits, target = problem(soft=soft)
    weight = torch.tensor([1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    options = {**options, **({"class_weight": weight} if "class_weight" in options else {})}
    expected, weights = by_loop(
        logits,
        target,
        AUGMENTED.tolist(),
        share,
        weight.tolist() if "class_weight" in options else [1.0] * CLASSES,
        options.get("label_smoothing", 0.0),
    )
    plain = -(F.log_softmax(logits, -1) * (target if soft else F.one_hot(target, CLASSES))).sum(-1)
    found = small_loss_weights(plain, AUGMENTED, share)
    assert found.tolist() == pytest.approx(weights)
    assert found[AUGMENTED].sum().item() == pytest.approx(16)
    loss = small_loss(logits, target, AUGMENTED, dropped_share=share, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    if share == 0:
        torch.testing.assert_close(
            loss,
            F.cross_entropy(
                logits,
                target,
                weight=options.get("class_weight"),
                label_smoothing=options.get("label_smoothing", 0.0),
            ),
        )


def test_dropped_rows_have_no_gradient_and_one_row_is_always_kept():
    logits, target = problem()
    logits.requires_grad_()
    small_loss(logits, target, AUGMENTED, dropped_share=0.25).backward()
    still = logits.grad.eq(0).all(-1)
    losses = F.cross_entropy(logits, target, reduction="none").detach()
    assert still.sum() == 4
    assert (still & ~AUGMENTED).sum() == 0
    assert losses[still].min() > losses[AUGMENTED & ~still].max()
    one = torch.arange(ROWS) == 3
    assert small_loss_weights(losses, one, 0.99).eq(1).all()
    assert small_loss_weights(losses, one & False, 0.5).eq(1).all()


def make_classifier(**settings):
    torch.manual_seed(0)
    return Classifier(nn.Linear(5, CLASSES), CLASSES, optimizer="sgd", lr=0.1, **settings)


def fit(model, batch, *callbacks):
    trainer = L.Trainer(
        max_steps=1,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, DataLoader([batch], batch_size=None))
    return trainer


@pytest.mark.parametrize("tell", [True, False], ids=["augmented rows", "all rows"])
def test_step_of_the_classifier_is_one_along_the_filtered_loss(tell):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 5, generator=generator)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    rows = torch.arange(ROWS)
    batch = AugmentedBatch(inputs, target, AUGMENTED, AUGMENTED.long(), rows)
    model, weight = make_classifier(dropped_share=0.25), make_classifier().network.weight
    trainer = fit(model, batch if tell else (inputs, target))
    before = make_classifier().network
    mask = AUGMENTED if tell else rows >= 0
    losses = F.cross_entropy(before(inputs), target, reduction="none")
    ranked = sorted(rows[mask].tolist(), key=lambda row: -losses[row].item())
    kept = [row for row in rows.tolist() if row not in ranked[: len(ranked) // 4]]
    share = [4 / 3 if mask[row] else 1.0 for row in kept]
    loss = (losses[kept] * torch.tensor(share)).sum() / ROWS
    loss.backward()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    expected = weight - 0.1 * before.weight.grad
    torch.testing.assert_close(model.network.weight, expected, atol=1e-6, rtol=0)


def test_filter_beside_the_callback_is_refused():
    rows = TensorDataset(torch.randn(8, 5), torch.randint(CLASSES, (8,)))
    callback = SAflexCallback(DataLoader(rows, 8))
    with pytest.raises(MisconfigurationException, match=r"`dropped_share` to be 0 .* got 0\.25"):
        fit(make_classifier(dropped_share=0.25), tuple(rows.tensors), callback)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_shares(share):
    with pytest.raises(ValueError, match=r"`dropped_share` to be a number in \[0, 1\)"):
        make_classifier(dropped_share=share)
