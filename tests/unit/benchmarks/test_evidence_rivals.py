"""Rivals that look a step ahead, against loops over rows and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from helpers.benchmarks import load_benchmark
from helpers.training import make_net, make_rows

from saflex_lightning import AugmentedBatch

rivals = load_benchmark("evidence_rivals")
CLEAN = 4


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = make_net(plain=True, dtype=torch.float64)
    inputs, target = make_rows(12, dtype=torch.float64)
    batch = AugmentedBatch(inputs, target, torch.arange(12) >= CLEAN)
    return net, batch, make_rows(20, seed=1, dtype=torch.float64)


def slopes(net, inputs, target):
    found = torch.autograd.grad(F.cross_entropy(net(inputs), target), [*net.parameters()])
    return torch.cat([part.ravel() for part in found])


def test_learning_to_reweight_is_the_positive_part_of_inner_products(case):
    net, batch, validation = case
    wanted = slopes(net, *validation)
    worth = [
        float(slopes(net, batch.inputs[row : row + 1], batch.target[row : row + 1]) @ wanted)
        for row in range(CLEAN, 12)
    ]
    positive = torch.tensor(worth, dtype=torch.float64).clamp(min=0)
    assert 0 < (positive > 0).sum() < len(positive)
    found = rivals.LearningToReweight(validation).weigh(net, batch)
    assert found[:CLEAN].tolist() == [1] * CLEAN
    torch.testing.assert_close(found[CLEAN:], positive / positive.mean())


def test_meta_weight_net_descends_the_validation_loss_one_step_ahead(case):
    net, batch, validation = case
    rival = rivals.MetaWeightNet(validation)
    rival.net.double()
    bias = rival.net[2].bias

    def ahead(change):
        with torch.no_grad():
            bias.add_(change)
        weights = torch.where(
            batch.augmented, rival.net(losses().unsqueeze(1)).squeeze(1), 1
        ).detach()
        (weights * losses(graph=True)).sum().div(weights.sum()).backward()
        with torch.no_grad():
            bias.sub_(change)
            params = {name: p - 0.1 * p.grad for name, p in net.named_parameters()}
        net.zero_grad()
        return F.cross_entropy(
            torch.func.functional_call(net, params, (validation[0],)), validation[1]
        ).item()

    def losses(*, graph=False):
        found = F.cross_entropy(net(batch.inputs), batch.target, reduction="none")
        return found if graph else found.detach()

    expected = (ahead(1e-4) - ahead(-1e-4)) / 2e-4
    weights = rival.weigh(net, batch)
    assert float(bias.grad) == pytest.approx(expected, rel=1e-4)
    assert weights[:CLEAN].tolist() == [1] * CLEAN
    assert ((weights[CLEAN:] > 0) & (weights[CLEAN:] < 1)).all()


def test_the_network_of_the_classifier_stays_as_it_is():
    torch.manual_seed(0)
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs, target = make_rows(12)
    batch = AugmentedBatch(inputs, target, torch.arange(12) >= CLEAN)
    for kind in (rivals.LearningToReweight, rivals.MetaWeightNet):
        kind(make_rows(20, seed=1)).weigh(net, batch)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(param.grad is None for param in net.parameters())
