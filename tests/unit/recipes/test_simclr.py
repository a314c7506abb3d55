"""SimCLR: pairs of views, the loss of Eq. 12, and features that a linear probe can use."""

import pytest
import torch
from helpers.training import fit, seeded

from saflex_lightning import SAflexCallback
from saflex_lightning.functional import info_nce
from saflex_lightning.recipes.batches import normalize
from saflex_lightning.recipes.contrastive import fit_linear_probe
from saflex_lightning.recipes.contrastive.simclr import (
    SimCLR,
    TwoViewsDataModule,
)
from saflex_lightning.recipes.medmnist import read_medmnist
from saflex_lightning.recipes.small_cnn import make_small_encoder


@pytest.fixture(scope="module")
def data():
    made = TwoViewsDataModule(batch_size=16, seed=1)
    made.setup("fit")
    return made


def make_model():
    return seeded(lambda: SimCLR(make_small_encoder(8), 32, projection=16))


def test_views_depend_on_seed_epoch_and_row_alone(data):
    rows, again = data.train_dataloader().dataset, data.train_dataloader().dataset
    for first, second in zip(rows[1, 5], again[1, 5], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(*rows[1, 5])
    assert not torch.equal(rows[1, 5][0], rows[2, 5][0])
    assert not torch.equal(rows[1, 5][0], rows[1, 6][0])


def test_more_images_in_a_batch_than_there_are():
    data = TwoViewsDataModule(batch_size=1201)
    data.setup("fit")
    with pytest.raises(ValueError, match="`batch_size` to be at most 1200"):
        data.train_dataloader()


def test_loss_without_the_callback_is_info_nce(data):
    model, batch = make_model(), next(iter(data.train_dataloader()))
    model.log = lambda *args, **kwargs: None
    features = model.projector(model.encoder(torch.cat(batch)))
    expected = info_nce(features[:16], features[16:], 5.0).mean()
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    with pytest.raises(ValueError, match=r"`logit_scale` to be positive, but got 0\.0"):
        SimCLR(make_small_encoder(), 128, logit_scale=0.0)


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_pairs_of_validation_images_steer_without_labels(data, preset):
    model = make_model()
    callback = SAflexCallback(data.saflex_dataloader(), preset, cache_on_device=False)
    fit(model, callback, train=data.train_dataloader(), max_epochs=1, limit_train_batches=2)
    for solution in model.saflex_solution:
        assert solution.soft_labels.shape == (16, 16)
        assert solution.weights.sum().item() == pytest.approx(16, rel=1e-4)


@pytest.mark.slow
def test_probe_reads_more_from_learned_features_than_from_random_ones(data):
    splits = read_medmnist()

    def probe_accuracy(model):
        with torch.no_grad():
            features = {
                name: model.eval()(normalize(splits[name].images[:600]))
                for name in ("train", "test")
            }
        probe = fit_linear_probe(features["train"], splits["train"].target[:600], 8, penalty=1e-4)
        right = probe(features["test"]).argmax(-1) == splits["test"].target[:600]
        return right.float().mean().item()

    model = make_model()
    before = probe_accuracy(model)
    fit(model.train(), train=data.train_dataloader(), max_epochs=3)
    assert probe_accuracy(model) > before
