"""The classifier: class weights, metrics, and the step Lightning takes."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch, SAflexCallback
from saflex_lightning.recipes import Classifier
from saflex_lightning.recipes.classifier import balanced_class_weight


class TwoColumns(nn.Module):
    """Numeric columns and one column of codes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 20)
        self.head = nn.Linear(22, 2)

    def forward(self, numeric, codes):
        return self.head(torch.cat([numeric, self.embedding(codes)], dim=-1))


class Columns(L.LightningDataModule):
    """Two kinds of columns per row; three rows of four are of class 0."""

    def __init__(self, size=24):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numeric = torch.randn(size, 2, generator=generator)
        codes = torch.randint(3, (size,), generator=generator)
        target = (torch.arange(size) % 4 == 3).long()
        self.rows = [((numeric[i], codes[i]), target[i]) for i in range(size)]
        self.batches = [AugmentedBatch((numeric, codes), target, torch.arange(size) % 2 > 0)]

    def class_counts(self):
        return torch.tensor([18, 6])

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=8)

    test_dataloader = saflex_dataloader = val_dataloader


def make_trainer(*callbacks, **settings):
    return L.Trainer(
        **{"max_epochs": 2, "num_sanity_val_steps": 0, **settings},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def test_optimizer_follows_the_schedule():
    model = Classifier(nn.Linear(2, 2), 2, lr=0.5, schedule="steps")
    model._trainer = SimpleNamespace(max_epochs=4)
    config = model.configure_optimizers()
    rates = []
    for _ in range(4):
        rates.append(config["optimizer"].param_groups[0]["lr"])
        config["optimizer"].step()
        config["lr_scheduler"].step()
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.005])


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_schedule_needs_the_number_of_epochs(max_epochs):
    model = Classifier(nn.Linear(2, 2), 2)
    model._trainer = SimpleNamespace(max_epochs=max_epochs)
    with pytest.raises(MisconfigurationException, match=r"`max_epochs` to be positive .* got -1"):
        model.configure_optimizers()
    model.schedule = "constant"
    model.configure_optimizers()


@pytest.mark.parametrize("armed", [False, True])
def test_columns_class_weights_and_smoothing_reach_the_loss(armed):
    torch.manual_seed(0)
    model = Classifier(TwoColumns(), 2, class_weight="balanced", label_smoothing=0.1, lr=0.0)
    labels_kept = {"label_rule": "argmax", "label_penalty": 1e9, "weight_rule": "ones"}
    callbacks = [SAflexCallback(preset="gradient", **labels_kept)] if armed else []
    trainer = make_trainer(*callbacks)
    data = Columns()
    trainer.fit(model, datamodule=data)
    assert model.class_weight.tolist() == pytest.approx([24 / 36, 24 / 12])
    (numeric, codes), target = data.batches[0][:2]
    expected = F.cross_entropy(
        model(numeric, codes),
        target,
        weight=torch.tensor([24 / 36, 24 / 12]),
        label_smoothing=0.1,
    )
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected)
    assert "class_weight" not in model.state_dict()
    assert ("saflex/val_gradient_norm" in trainer.callback_metrics) == armed


def test_metrics_of_two_classes_by_hand(monkeypatch):
    model = Classifier(nn.Identity(), 2)
    logged = {}
    monkeypatch.setattr(model, "log", lambda name, metric, **_: logged.update({name: metric}))
    margin = torch.tensor([0.1, 0.4, 0.35, 0.8]) - 0.5
    model.test_step((torch.stack([-margin, margin], -1), torch.tensor([0, 0, 1, 1])), 0)
    # Predictions 0, 0, 0, 1; three of four pairs of a negative and a positive are in order.
    assert logged["test/accuracy"].compute().item() == pytest.approx(3 / 4)
    assert logged["test/auroc"].compute().item() == pytest.approx(3 / 4)
    assert logged["test/f1"].compute().item() == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_scores_between_0_and_1_are_no_probabilities(monkeypatch):
    model = Classifier(nn.Identity(), 2)
    logged = {}
    monkeypatch.setattr(model, "log", lambda name, metric, **_: logged.update({name: metric}))
    scores = torch.tensor([[0.9, 0.9], [0.0, 0.1], [0.5, 0.9], [0.1, 0.8]])
    model.test_step((scores, torch.tensor([0, 1, 0, 1])), 0)
    # By the margins 0.0, 0.1, 0.4, 0.7 of class 1: three of four pairs are in order.
    assert logged["test/auroc"].compute().item() == pytest.approx(3 / 4)


def test_metrics_of_each_stage_are_logged():
    trainer = make_trainer(max_epochs=1)
    model = Classifier(TwoColumns(), 2)
    trainer.fit(model, datamodule=Columns())
    wanted = {"accuracy", "auroc", "f1"}
    assert {f"val/{name}" for name in wanted} < trainer.callback_metrics.keys()
    metrics = trainer.test(model, datamodule=Columns(), verbose=False)[0]
    assert {f"test/{name}" for name in wanted} == metrics.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, r"`optimizer` to be one of \['adam', 'adamw', 'sgd'\], but got"),
        ({"schedule": "step"}, r"`schedule` to be one of \['constant', 'cosine', 'steps'\]"),
        ({"class_weight": [1.0]}, r"list of 2 non-negative numbers, but got \[1\.0\]"),
        ({"class_weight": [1.0, -1.0]}, r"but got \[1\.0, -1\.0\]"),
        ({"class_weight": "inverse"}, "`class_weight` .* but got 'inverse'"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` to be a number in \[0, 1\), but got 1\.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(nn.Linear(2, 2), 2, **settings)


def test_balanced_needs_counts():
    model = Classifier(TwoColumns(), 2, class_weight="balanced")
    rows = DataLoader(Columns().batches, batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"a method `class_counts\(\)` with"):
        make_trainer().fit(model, rows)


def test_balanced_weights_share_the_loss_and_allow_an_absent_class():
    counts = torch.tensor([6, 3, 0])
    weight = balanced_class_weight(counts)
    assert (weight * counts).tolist() == [3.0, 3.0, 0.0]
    assert weight.tolist() == [0.5, 1.0, 3.0]


@pytest.mark.parametrize("given", [[1, 3], [1.0, 3.0], OmegaConf.create([1, 3])])
def test_class_weights_of_any_list(given):
    weight = Classifier(nn.Linear(2, 2), 2, class_weight=given).class_weight
    assert weight.dtype == torch.float32
    assert weight.tolist() == [1.0, 3.0]


def test_rows_of_a_dataset_of_pairs_are_collated_to_lists():
    loader = DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4).long()), batch_size=4)
    model = Classifier(nn.Linear(2, 2), 2)
    assert model.saflex_val_batch(next(iter(loader)))[0][0].shape == (4, 2)
