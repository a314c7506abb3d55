"""Mixtures of weights, linear probes, and fine-tuning that starts from one."""

import numpy as np
import pytest
import torch
from helpers.clip import NAMES, TINY, make_images, make_tuner, union_batches
from helpers.training import assert_same_state, fit, make_trainer, state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from scipy.optimize import minimize
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback
from saflex_lightning.recipes.contrastive import (
    FitHeadFirst,
    MacroF1,
    OpenClipEncoders,
    TowerClassifier,
    WeightEnsembling,
    fit_linear_probe,
)
from saflex_lightning.recipes.contrastive.ensembling import mix_states


def val_loader(rows=24, seed=7):
    return DataLoader(TensorDataset(*make_images(rows, seed=seed)), 12)


def test_states_are_mixed_entry_by_entry():
    start = {"w": torch.tensor([0.0, 10.0]), "steps": torch.tensor(1)}
    end = {"w": torch.tensor([4.0, 20.0]), "steps": torch.tensor(7)}
    mixed = mix_states(start, end, 0.25)
    assert mixed["w"].tolist() == [1.0, 12.5]
    assert mixed["steps"] == 7
    assert mix_states(start, end, 0.0)["w"] is start["w"]
    assert mix_states(start, end, 1.0)["w"] is end["w"]


def test_the_mixture_with_the_best_validation_score_is_kept(tmp_path):
    class Watched(WeightEnsembling):
        def on_train_end(self, trainer, pl_module):
            self.end = state_of(pl_module)
            super().on_train_end(trainer, pl_module)

    file = tmp_path / "new" / "mixed.ckpt"
    module, ensembling = make_tuner(lr=3e-3), Watched(intervals=4, filepath=str(file))
    start = state_of(module)
    fit(module, ensembling, train=union_batches(), val_dataloaders=val_loader(), max_epochs=3)
    images, labels = make_images(24, seed=7)
    kept = state_of(module)
    by_hand = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        module.load_state_dict(mix_states(start, ensembling.end, alpha))
        metric = MacroF1(len(NAMES))
        with torch.no_grad():
            metric.update(module.eval()(images), labels)
        by_hand[alpha] = metric.compute().item()
    assert ensembling.scores == pytest.approx(by_hand)
    assert len(set(by_hand.values())) > 1  # otherwise picking the best would mean nothing
    best = max(by_hand.values())
    assert ensembling.alpha == min(alpha for alpha, score in by_hand.items() if score == best)
    assert_same_state(kept, mix_states(start, ensembling.end, ensembling.alpha))
    assert_same_state(kept, torch.load(file, weights_only=False)["state_dict"])


def test_a_resumed_run_mixes_with_the_weights_of_the_first_start(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "one.ckpt")
            assert not torch.equal(
                pl_module.encoders.logit_scale, start["encoders.model.logit_scale"]
            )

    settings = {"train": union_batches(), "val_dataloaders": val_loader()}
    module = make_tuner()
    start = state_of(module)
    fit(module, WeightEnsembling(intervals=1), Save(), **settings, max_epochs=1)
    resumed = WeightEnsembling(intervals=1)
    fit(make_tuner(), resumed, **settings, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert_same_state(resumed.state_dict()["start"], start)


def test_the_start_of_another_model_is_refused_before_training():
    class Load(Callback):
        def setup(self, trainer, pl_module, stage):
            ensembling.load_state_dict({"start": {"weight": torch.ones(1)}})

    ensembling = WeightEnsembling()
    with pytest.raises(TypeError, match="`start` to be a mapping of names to values"):
        ensembling.load_state_dict({})
    settings = {"train": union_batches(), "val_dataloaders": val_loader()}
    with pytest.raises(MisconfigurationException, match="other names or shapes"):
        fit(make_tuner(), ensembling, Load(), **settings, max_epochs=1)
    assert not ensembling.scores


def test_ensembling_needs_no_validation_during_training():
    ensembling = WeightEnsembling(intervals=1)
    module, seen = make_tuner(), []
    score = module.forward
    module.forward = lambda images: seen.append(len(images)) or score(images)
    settings = {
        "val_dataloaders": val_loader(),
        "check_val_every_n_epoch": 5,
        "num_sanity_val_steps": 0,
    }
    fit(module, ensembling, train=union_batches(), max_epochs=1, limit_val_batches=1, **settings)
    assert ensembling.scores.keys() == {0.0, 1.0}
    assert seen == [12, 12]  # one batch of the two for each mixture


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_ensembling_without_validation_rows_is_refused():
    with pytest.raises(Exception, match="Expected validation rows for `WeightEnsembling`"):
        fit(make_tuner(), WeightEnsembling(), train=union_batches(), max_epochs=1)
    none = {"val_dataloaders": [], "num_sanity_val_steps": 0}
    with pytest.raises(Exception, match="Expected validation rows for `WeightEnsembling`"):
        fit(make_tuner(), WeightEnsembling(), train=union_batches(), max_epochs=1, **none)
    with pytest.raises(ValueError, match="`intervals` to be a positive integer, but got 0"):
        WeightEnsembling(0)


def test_probe_solves_the_penalised_problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (40,), generator=generator)
    probe = fit_linear_probe(features, target, 3, penalty=0.05, max_iterations=500)

    def objective(flat):
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        scores = features.numpy() @ weight.T + bias
        scores = scores - scores.max(1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return -log_p[np.arange(40), target.numpy()].mean() + 0.025 * (weight**2).sum()

    reference = minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    found = np.concatenate([probe.weight.detach().numpy().ravel(), probe.bias.detach().numpy()])
    assert objective(found) == pytest.approx(reference.fun, abs=1e-6)
    np.testing.assert_allclose(found[:15], reference.x[:15], atol=1e-3)


def make_tower_classifier():
    torch.manual_seed(5)
    return TowerClassifier(OpenClipEncoders(config=TINY), len(NAMES), lr=1e-4, warmup_steps=1)


def test_tower_leaves_the_text_side_alone():
    network = make_tower_classifier().network
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {"head.weight", "encoders.model.visual.proj"} <= trained
    assert not {"encoders.model.text_projection", "encoders.model.logit_scale"} & trained
    loss = network(make_images(3)[0]).sum()
    loss.backward()
    unused = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused  # so that DDP needs no search for unused parameters


def test_head_is_fitted_before_the_first_step():
    class Watch(FitHeadFirst):
        def on_train_start(self, trainer, pl_module):
            modes = {part: part.training for part in pl_module.modules()}
            super().on_train_start(trainer, pl_module)
            assert modes == {part: part.training for part in pl_module.modules()}
            self.head = state_of(pl_module.network.head)
            self.tower = state_of(pl_module.network.encoders)

        def on_train_epoch_end(self, trainer, pl_module):
            self.end = state_of(pl_module)

    module, watch, ensembling = make_tower_classifier(), Watch(), WeightEnsembling(intervals=1)
    before = state_of(module.network.encoders)
    batches = union_batches()
    saflex = SAflexCallback(val_loader(seed=8))
    rows = {"train": batches, "val_dataloaders": val_loader()}
    fit(module, ensembling, watch, saflex, **rows, max_epochs=1)
    assert_same_state(watch.tower, before)
    mixed_with = ensembling.state_dict()["start"]
    assert torch.equal(mixed_with["network.head.weight"], watch.head["weight"])
    # The same probe from the rows of one epoch, by hand.
    fresh = make_tower_classifier().eval()
    with torch.no_grad():
        features = torch.cat([fresh.network.features(batch.inputs) for batch in batches])
    probe = fit_linear_probe(features, torch.cat([batch.target for batch in batches]), len(NAMES))
    torch.testing.assert_close(watch.head, state_of(probe), rtol=1e-4, atol=1e-5)
    module.load_state_dict(watch.end)
    assert not torch.equal(module.network.head.weight, watch.head["weight"])


def test_probe_first_reads_no_more_batches_than_the_training():
    module, batches = make_tower_classifier(), union_batches()
    network, seen = module.network, []
    make = network.features
    network.features = lambda images: seen.append(len(images)) or make(images)
    fit(module, FitHeadFirst(), train=batches, max_epochs=1, limit_train_batches=1)
    assert seen == [len(next(iter(batches)).inputs)] * 2  # for the probe, and in training
    assert len(batches) > 1


def test_probe_first_needs_a_tower():
    module = make_tuner()
    with pytest.raises(Exception, match=r"`network` to be an `ImageTower`.*got NoneType"):
        make_trainer(FitHeadFirst(), max_epochs=1).fit(module, union_batches())
