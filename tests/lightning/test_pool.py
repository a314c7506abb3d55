"""Weights of a fixed pool's rows in a fit: wrong labels lose weight, by index, over epochs."""

import pytest
import torch
from helpers.training import (
    NUM_CLASSES,
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_rows,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning import AugmentedBatch, SAflexCallback

ROWS, BATCH, EPOCHS = 192, 32, 12
WRONG = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) < 0.4
pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected more matched parameters than unknowns"  # the head engine on a tiny net
)


def pool(*, batched=True, shuffle=True):
    """Rows of which the first quarter of every batch is clean, and 40 % of the others wrong."""
    inputs, target = make_rows(ROWS)
    wrong = WRONG & (torch.arange(ROWS) >= ROWS // 4)
    given = torch.where(wrong, (target + 1) % NUM_CLASSES, target)

    def collate(samples):
        inputs, target, index = (torch.stack(column) for column in zip(*samples, strict=True))
        if not batched:
            return inputs, target, index
        augmented = index >= ROWS // 4
        none = torch.full_like(index, -1)
        return AugmentedBatch(inputs, target, augmented, augmented.long(), index, none)

    rows = TensorDataset(inputs, given, torch.arange(ROWS))
    return DataLoader(rows, BATCH, shuffle=shuffle, collate_fn=collate)


class Recording(Classifier):
    """Keeps the newest weight of every row, and averages none itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weights = torch.zeros(ROWS)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        index = batch.index if isinstance(batch, AugmentedBatch) else batch[2]
        self.weights[index] = self.saflex_solution.weights
        return loss

    def loss(self, batch):
        return self.saflex_loss(self.saflex_forward(batch[0]), batch[1])


class Telling(Recording):
    """Tells mask and index to the loss."""

    def loss(self, batch):
        inputs, target, index = batch
        mask = index >= ROWS // 4
        return self.saflex_loss(self.saflex_forward(inputs), target, augmented=mask, index=index)


def train(module, row_evidence, loader=None, **kwargs):
    callback = SAflexCallback(
        make_loader(96, seed=7),
        row_evidence=row_evidence,
        **{"engine": "head", "weight_rule": "ones", "label_rule": "keep"},
    )
    loader = pool() if loader is None else loader
    trainer = fit(module, callback, train=loader, **{"max_epochs": EPOCHS, **kwargs})
    return trainer, callback


@pytest.mark.parametrize(
    ("row_evidence", "least"), [("label_probability", 0.8), ("discriminant", 0.9)]
)
def test_wrong_labels_lose_weight(row_evidence, least):
    module = seeded(lambda: Recording(plain=True))
    _, callback = train(module, row_evidence)
    made = torch.arange(ROWS) >= ROWS // 4
    assert module.weights[~made].eq(1).all()
    auroc = binary_auroc(module.weights[made], (~WRONG[made]).long()).item()
    assert auroc > least
    assert module.weights[made & WRONG].mean() < 0.6 * module.weights[made & ~WRONG].mean()
    evidence = callback.read_row_evidence()
    assert evidence.isnan().equal(~made)
    assert binary_auroc(evidence[made].float(), (~WRONG[made]).long()).item() > least


@pytest.mark.parametrize("row_evidence", ["label_probability", "discriminant"])
def test_index_given_to_the_loss_is_that_of_the_batch(row_evidence):
    module, telling = (seeded(lambda kind=kind: kind(plain=True)) for kind in (Recording, Telling))
    train(module, row_evidence, max_epochs=3)
    train(telling, row_evidence, pool(batched=False), max_epochs=3)
    assert_same_state(state_of(module), state_of(telling))
    assert module.weights.equal(telling.weights)


@pytest.mark.parametrize("row_evidence", ["label_probability", "discriminant"])
def test_a_resumed_run_equals_an_uninterrupted_one(row_evidence, tmp_path):
    class Interrupted(Recording):
        def on_train_epoch_end(self):
            if self.current_epoch == 2:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = seeded(lambda: Interrupted(plain=True))
    train(whole, row_evidence, pool(shuffle=False), max_epochs=5)
    resumed = seeded(lambda: Recording(plain=True))
    file = tmp_path / "middle.ckpt"
    train(resumed, row_evidence, pool(shuffle=False), max_epochs=5, ckpt_path=file)
    assert_same_state(state_of(whole), state_of(resumed))
    assert whole.weights.equal(resumed.weights)


def test_batches_without_an_index():
    module = seeded(lambda: Classifier(plain=True))
    with pytest.raises(MisconfigurationException, match=r"`saflex_loss\(..., index=\)`, for `row_"):
        train(module, "label_probability", make_loader())


def test_a_model_without_a_linear_layer():
    module = seeded(Recording)
    module.net = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 8), nn.Flatten())
    message = "Expected `row_evidence='discriminant'` to find an `nn.Linear`"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, SAflexCallback(make_loader(), row_evidence="discriminant"), train=pool())


def test_a_setting_that_is_not_a_choice():
    message = r"`row_evidence` to be None or one of \['discriminant', 'label_probability'\]"
    with pytest.raises(ValueError, match=message):
        SAflexCallback(row_evidence="pi")
