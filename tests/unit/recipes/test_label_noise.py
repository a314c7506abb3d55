"""Wrong labels planted on purpose: how they are drawn, and the score of their detection."""

import lightning as L
import pytest
import torch
from helpers.folders import make_image_folders, make_pool
from torch import nn

from saflex_lightning import SAflexCallback
from saflex_lightning.cli.report import RunReport, read_report
from saflex_lightning.recipes import Classifier, GeneratedDataModule
from saflex_lightning.recipes.label_noise import detection_auroc, plant_wrong_labels

CLASSES = 5


def plant(target, share, seed=0):
    return plant_wrong_labels(target, CLASSES, share, torch.Generator().manual_seed(seed))


def test_one_class_has_no_other_label():
    target, generator = torch.zeros(4, dtype=torch.int64), torch.Generator()
    assert plant_wrong_labels(target, 1, 0.0, generator).equal(target)
    with pytest.raises(ValueError, match=r"two classes or more with `label_noise`=0\.4, but got 1"):
        plant_wrong_labels(target, 1, 0.4, generator)


def test_every_other_class_is_as_likely():
    target = torch.arange(20_000) % CLASSES
    given = plant(target, 0.4)
    wrong = given != target
    assert wrong.float().mean().item() == pytest.approx(0.4, abs=0.02)
    shift = (given - target)[wrong] % CLASSES
    assert (shift.bincount()[1:] / wrong.sum()).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    rates = [wrong[target == label].float().mean().item() for label in range(CLASSES)]
    assert rates == pytest.approx([0.4] * CLASSES, abs=0.03)


def test_draws_are_those_of_the_generator():
    target = torch.arange(200) % CLASSES
    assert plant(target, 0.4).equal(plant(target, 0.4))
    assert not plant(target, 0.4).equal(plant(target, 0.4, seed=1))
    assert plant(target, 0.0).equal(target)
    assert plant(target, 1.0).ne(target).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("noisy")
    make_image_folders(root / "real", splits=("val", "test"))
    make_pool(root / "pool")
    return root


def fit(folders, *, row_evidence=True, **settings):
    data = GeneratedDataModule(
        str(folders / "real"),
        str(folders / "pool"),
        **{"image_size": None, "batch_size": 4, "redraw": True, "per_class": "real", **settings},
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model = Classifier(network, 3, schedule="constant")
    callback = SAflexCallback(row_evidence=row_evidence)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, RunReport()],
    )
    trainer.fit(model, datamodule=data)
    return trainer, callback, data


def test_score_is_the_share_of_pairs_in_the_right_order(folders):
    trainer, callback, data = fit(folders, label_noise=0.4)
    found, wrong = callback.read_row_evidence(), data.wrong_rows()
    seen = found.index.tolist()
    evidence = dict(zip(seen, found.evidence, strict=True))
    assert min(seen) >= 12  # real images are no rows of the pool
    assert 12 < len(seen) < 48  # two draws of 12 among 48
    pairs = [
        (evidence[right] > evidence[row]).item() + 0.5 * (evidence[right] == evidence[row]).item()
        for row in seen
        for right in seen
        if wrong[row] and not wrong[right]
    ]
    expected = sum(pairs) / len(pairs)
    assert 0 < expected < 1
    assert detection_auroc(trainer) == pytest.approx(expected, abs=1e-6)
    report = read_report(trainer.callback_metrics)
    assert report["wrong_label_auroc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "settings", [{"row_evidence": False}, {"label_noise": 0.0}, {"drop_wrong": True}]
)
def test_nothing_to_score(folders, settings):
    trainer, callback, _ = fit(folders, **{"label_noise": 0.4, **settings})
    assert (callback.read_row_evidence() is None) == ("row_evidence" in settings)
    assert detection_auroc(trainer) is None
    assert "wrong_label_auroc" not in read_report(trainer.callback_metrics)
