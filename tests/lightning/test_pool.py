"""Weights of a fixed pool's rows in a fit: wrong labels lose weight, by index, over epochs."""

from dataclasses import replace

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
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning import AugmentedBatch, SAflexCallback

ROWS, BATCH, EPOCHS = 192, 32, 12
WRONG = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) < 0.4


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
        return AugmentedBatch(inputs, target, augmented, augmented.long(), index)

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


def train(module, loader=None, **kwargs):
    callback = SAflexCallback(make_loader(96, seed=7))
    loader = pool() if loader is None else loader
    trainer = fit(module, callback, train=loader, **{"max_epochs": EPOCHS, **kwargs})
    return trainer, callback


def test_wrong_labels_lose_weight():
    module = seeded(lambda: Recording(plain=True))
    _, callback = train(module)
    made = torch.arange(ROWS) >= ROWS // 4
    assert module.weights[~made].eq(1).all()
    auroc = binary_auroc(module.weights[made], (~WRONG[made]).long()).item()
    assert auroc > 0.9
    assert module.weights[made & WRONG].mean() < 0.6 * module.weights[made & ~WRONG].mean()
    index, evidence = callback.read_row_evidence()
    assert index.tolist() == made.nonzero().flatten().tolist()
    assert binary_auroc(evidence.float(), (~WRONG[made]).long()).item() > 0.9


def test_index_given_to_the_loss_is_that_of_the_batch():
    module, telling = (seeded(lambda kind=kind: kind(plain=True)) for kind in (Recording, Telling))
    train(module, max_epochs=3)
    train(telling, pool(batched=False), max_epochs=3)
    assert_same_state(state_of(module), state_of(telling))
    assert module.weights.equal(telling.weights)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    class Interrupted(Recording):
        def on_train_epoch_end(self):
            if self.current_epoch == 2:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = seeded(lambda: Interrupted(plain=True))
    train(whole, pool(shuffle=False), max_epochs=5)
    resumed = seeded(lambda: Recording(plain=True))
    file = tmp_path / "middle.ckpt"
    train(resumed, pool(shuffle=False), max_epochs=5, ckpt_path=file)
    assert_same_state(state_of(whole), state_of(resumed))
    assert whole.weights.equal(resumed.weights)


def test_batches_without_an_index_are_weighed_by_the_step_alone():
    module = seeded(lambda: Classifier(plain=True))
    _, callback = train(module, make_loader(seed=3))
    index, evidence = callback.read_row_evidence()
    assert len(index) == len(evidence) == 0
    assert module.saflex_solution.weights.std() > 0


def test_a_setting_that_is_not_a_choice():
    with pytest.raises(
        ValueError, match="Expected `row_evidence` to be True or False, but got 'pi'"
    ):
        SAflexCallback(row_evidence="pi")


def test_indices_may_be_huge_negative_or_far_apart():
    """The same run, whatever the rows are called."""
    far = torch.tensor([-(10**12), 7, 10**15])

    class Renamed(Recording):
        def loss(self, batch):
            names = batch.index * 10**9 + far[batch.index % 3]
            return super().loss(replace(batch, index=names))

    plain, renamed = (seeded(lambda kind=kind: kind(plain=True)) for kind in (Recording, Renamed))
    train(plain, max_epochs=3)
    train(renamed, max_epochs=3)
    assert_same_state(state_of(plain), state_of(renamed))
