"""Evidence about rows of a fixed pool: plain loops, and planted wrong labels in a real training."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning.engines import make_engine, make_tangent
from saflex_lightning.functional import solve
from saflex_lightning.row_evidence import RowAverages, discriminant_posteriors

CLASSES = 10


class TestAverages:
    def test_averages_equal_plain_sums(self):
        generator = torch.Generator().manual_seed(0)
        averages, seen = RowAverages(), {}
        for _ in range(5):
            index = torch.randperm(9, generator=generator)[:4]
            values = torch.rand(4, generator=generator)
            for key, value in zip(index.tolist(), values.tolist(), strict=True):
                seen.setdefault(key, []).append(value)
            found = averages.update(index, values)
            expected = [sum(seen[key]) / len(seen[key]) for key in index.tolist()]
            assert found.tolist() == pytest.approx(expected)
        for key, value in enumerate(averages.read().tolist()):
            if key in seen:
                assert value == pytest.approx(sum(seen[key]) / len(seen[key]))
            else:
                assert value != value

    def test_rows_without_identity_or_a_finite_number_are_left_out(self):
        averages = RowAverages()
        averages.update(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
        values = torch.tensor([0.1, torch.nan, 0.9])
        found = averages.update(torch.tensor([-1, 1, 2]), values)
        assert found.tolist() == pytest.approx([0.1, 0.5, 0.9])
        assert averages.read().tolist() == pytest.approx([0.5, 0.5, 0.9])

    def test_a_batch_without_rows(self):
        assert RowAverages().update(torch.zeros(0, dtype=torch.long), torch.zeros(0)).shape == (0,)

    def test_restored_averages_go_on_alike(self):
        first, copy = RowAverages(), RowAverages()
        first.update(torch.tensor([3, 1]), torch.tensor([0.2, 0.4]))
        copy.load_state_dict(first.state_dict())
        for one in (first, copy):
            one.update(torch.tensor([3]), torch.tensor([0.6]))
        torch.testing.assert_close(first.read(), copy.read(), equal_nan=True)


class TestDiscriminant:
    def test_posteriors_equal_gaussians_with_a_shared_covariance(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        features = torch.randn(60, 4, generator=generator, dtype=torch.float64)
        features[:, :3] += 2 * one_hot(labels, 3)
        found = discriminant_posteriors(features[:9], features, one_hot(labels, 3).double())
        # One pseudo-row at the common mean for each class, then density and prior, row by row.
        center = features.mean(0)
        counts = labels.bincount().double() + 1
        means = [(features[labels == k].sum(0) + center) / counts[k] for k in range(3)]
        centred = [features[i] - means[labels[i]] for i in range(60)]
        covariance = sum(torch.outer(row, row) for row in centred) / 60
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(4)
        for i in range(9):
            log_density = torch.stack(
                [
                    torch.distributions.MultivariateNormal(means[k], covariance).log_prob(
                        features[i]
                    )
                    for k in range(3)
                ]
            )
            torch.testing.assert_close(found[i], (log_density + counts.log()).softmax(0))

    def test_decisions_agree_with_scikit_learn(self):
        inputs, target = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        labels = one_hot(target, CLASSES).double()
        found = discriminant_posteriors(inputs[900:], inputs[:900], labels[:900]).argmax(1)
        other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        expected = torch.as_tensor(other.fit(inputs[:900], target[:900]).predict(inputs[900:]))
        assert (found == expected).float().mean() > 0.98

    def test_a_class_without_validation_rows_and_absent_rows(self):
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        present = torch.tensor([1.0, 1.0, 0.0])
        found = discriminant_posteriors(features, features, labels, present)
        expected = discriminant_posteriors(features, features[:2], labels[:2])
        torch.testing.assert_close(found, expected)
        assert found.gt(0).all()
        assert found[:2].argmax(1).tolist() == [0, 1]

    def test_constant_features(self):
        same = torch.ones(4, 3)
        assert discriminant_posteriors(same, same, torch.eye(4)).isfinite().all()


def detect(seed, epochs):
    """Train on digits with 40 % wrong labels; return the AUROC of each way to find them."""
    inputs, target = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    inputs, target = torch.tensor(inputs).float()[order] / 16, torch.tensor(target)[order]
    val_inputs, val_target = inputs[:200], target[:200]
    inputs, target = inputs[200:], target[200:]
    wrong = torch.rand(len(target), generator=generator) < 0.4
    shift = torch.randint(1, CLASSES, target.shape, generator=generator)
    given = torch.where(wrong, (target + shift) % CLASSES, target)

    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters())
    engine = make_engine("head", model)
    averages = {name: RowAverages() for name in ("probability", "discriminant", "inner product")}
    for _ in range(epochs):
        for rows in torch.randperm(len(target), generator=generator).split(64):
            gradient = engine.gradient(
                lambda: model(val_inputs), lambda logits: cross_entropy(logits, val_target)
            )
            logits, tangent = engine.measure(
                lambda rows=rows: model(inputs[rows]), make_tangent(gradient)
            )
            with torch.no_grad():
                probs = logits.softmax(-1)
                solution = solve(tangent, probs, given[rows])
                posteriors = discriminant_posteriors(
                    body(inputs[rows]), body(val_inputs), one_hot(val_target, CLASSES).float()
                )
            numbers = (probs, posteriors, solution.inner_products)
            for average, values in zip(averages.values(), numbers, strict=True):
                average.update(rows, values.gather(1, given[rows].unsqueeze(1)).squeeze(1))
            optimizer.zero_grad()
            cross_entropy(logits, given[rows]).backward()
            optimizer.step()
    return {
        name: binary_auroc(average.read().float(), (~wrong).long()).item()
        for name, average in averages.items()
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_wrong_labels_are_found(seed):
    early, late = detect(seed, 2), detect(seed, 12)
    assert early["discriminant"] > 0.93
    assert late["discriminant"] > 0.93
    assert late["probability"] > 0.93
    assert late["inner product"] < min(late["probability"], late["discriminant"])
    print(early, late)
