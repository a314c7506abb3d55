"""Evidence about rows of a fixed pool: plain loops, and planted wrong labels in a real training."""

from copy import deepcopy

import pytest
import torch
from helpers.solving import ALONE, in_parts, measure, solve
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.evidence.rows import RowAverages, discriminant_posteriors

CLASSES = 10


KEYS = torch.tensor([-(2**63), -7, 0, 3, 4, 10**6, 2**40, 2**62, 2**63 - 1])


def update(averages, index, values, counted=None, ranks=ALONE):
    index, values = torch.as_tensor(index), torch.as_tensor(values)
    counted = torch.ones(len(values), dtype=torch.bool) if counted is None else counted
    return averages.update(index, values, torch.as_tensor(counted), ranks)


class TestAverages:
    def test_averages_equal_plain_sums(self):
        generator = torch.Generator().manual_seed(0)
        averages, seen = RowAverages(), {}
        for _ in range(5):
            index = KEYS[torch.randperm(8, generator=generator)[:4]]
            values = torch.rand(4, generator=generator)
            for key, value in zip(index.tolist(), values.tolist(), strict=True):
                seen.setdefault(key, []).append(value)
            found = update(averages, index, values)
            expected = [sum(seen[key]) / len(seen[key]) for key in index.tolist()]
            assert found.tolist() == pytest.approx(expected)
        index, evidence = averages.read()
        assert index.tolist() == sorted(seen)
        assert evidence.tolist() == pytest.approx(
            [sum(seen[key]) / len(seen[key]) for key in sorted(seen)]
        )

    def test_a_row_may_stand_in_a_batch_twice(self):
        averages = RowAverages()
        assert update(averages, [5, 5, 2], [0.2, 0.4, 0.9]).tolist() == pytest.approx(
            [0.3, 0.3, 0.9]
        )
        assert averages.read().index.tolist() == [2, 5]

    def test_rows_that_do_not_count_or_have_no_finite_number_are_left_out(self):
        averages = RowAverages()
        assert update(averages, [8], [0.3], [False]).tolist() == pytest.approx([0.3])
        assert averages.read().index.tolist() == []
        update(averages, [0, 1], [0.5, 0.5])
        counted = [False, True, True, False]
        found = update(averages, [-1, 1, 2, 0], [0.1, torch.nan, 0.9, 0.7], counted)
        assert found.tolist() == pytest.approx([0.1, 0.5, 0.9, 0.5])
        index, evidence = averages.read()
        assert index.tolist() == [0, 1, 2]
        assert evidence.tolist() == pytest.approx([0.5, 0.5, 0.9])

    def test_a_number_that_is_not_finite_is_nobody_s_average(self):
        assert update(RowAverages(), [4], [torch.inf]).tolist() == [torch.inf]

    @pytest.mark.parametrize("before", [[], [3]])
    def test_a_batch_without_rows(self, before):
        averages = RowAverages()
        update(averages, torch.tensor(before, dtype=torch.long), torch.ones(len(before)))
        assert update(averages, torch.zeros(0, dtype=torch.long), torch.zeros(0)).shape == (0,)

    def test_restored_averages_go_on_alike(self):
        first, copy = RowAverages(), RowAverages()
        update(first, [3, 1], [0.2, 0.4])
        copy.load_state_dict(first.state_dict())
        for one in (first, copy):
            update(one, [3, 9], [0.6, 0.7])
        for found, expected in zip(copy.read(), first.read(), strict=True):
            assert torch.equal(found, expected)

    def test_a_state_that_was_loaded_stays_as_it_was(self):
        first, copy = RowAverages(), RowAverages()
        update(first, [3, 1], [0.2, 0.4])
        state = first.state_dict()
        before = deepcopy(state)
        copy.load_state_dict(state)
        update(copy, [3, 9], [0.6, 0.7])
        assert all(torch.equal(state[name], before[name]) for name in before)

    def test_ranks_share_the_averages_of_the_whole_batch(self):
        index, values = KEYS[[8, 0, 3, 3, 5]], torch.rand(5)
        counted = torch.tensor([True, True, True, True, False])
        whole = RowAverages()
        expected = update(whole, index, values, counted)

        def work(own, ranks):
            averages = RowAverages()
            return update(averages, index[own], values[own], counted[own], ranks), averages.read()

        parts = in_parts([4, 1], work)
        torch.testing.assert_close(torch.cat([found for found, _ in parts]), expected)
        for _, (rows, evidence) in parts:
            assert torch.equal(rows, whole.read().index)
            torch.testing.assert_close(evidence, whole.read().evidence)


class TestDiscriminant:
    def test_posteriors_equal_gaussians_with_a_shared_covariance(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        features = torch.randn(60, 4, generator=generator, dtype=torch.float64)
        features[:, :3] += 2 * one_hot(labels, 3)
        found = discriminant_posteriors(
            features[:9], features, one_hot(labels, 3).double(), torch.ones(60).double()
        )
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
        present = torch.ones(900, dtype=torch.float64)
        found = discriminant_posteriors(inputs[900:], inputs[:900], labels[:900], present).argmax(1)
        other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        expected = torch.as_tensor(other.fit(inputs[:900], target[:900]).predict(inputs[900:]))
        assert (found == expected).float().mean() > 0.98

    def test_a_class_without_validation_rows_and_absent_rows(self):
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        present = torch.tensor([1.0, 1.0, 0.0])
        found = discriminant_posteriors(features, features, labels, present)
        expected = discriminant_posteriors(features, features[:2], labels[:2], torch.ones(2))
        torch.testing.assert_close(found, expected)
        assert found.gt(0).all()
        assert found[:2].argmax(1).tolist() == [0, 1]

    def test_constant_features(self):
        same = torch.ones(4, 3)
        assert discriminant_posteriors(same, same, torch.eye(4), torch.ones(4)).isfinite().all()


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
    engine = make_engine("head", model, lambda: model(val_inputs))
    averages = {name: RowAverages() for name in ("probability", "discriminant", "inner product")}
    for _ in range(epochs):
        for rows in torch.randperm(len(target), generator=generator).split(64):
            gradient = engine.gradient(
                lambda: model(val_inputs), lambda logits: cross_entropy(logits, val_target)
            )
            logits, jvp = measure(
                engine, lambda rows=rows: model(inputs[rows]), descent_direction(gradient)
            )
            with torch.no_grad():
                probs = logits.softmax(-1)
                solution = solve(jvp, probs, given[rows])
                posteriors = discriminant_posteriors(
                    body(inputs[rows]),
                    body(val_inputs),
                    one_hot(val_target, CLASSES).float(),
                    torch.ones(len(val_target)),
                )
            numbers = (probs, posteriors, solution.inner_products)
            for average, values in zip(averages.values(), numbers, strict=True):
                update(average, rows, values.gather(1, given[rows].unsqueeze(1)).squeeze(1))
            optimizer.zero_grad()
            cross_entropy(logits, given[rows]).backward()
            optimizer.step()
    return {
        name: binary_auroc(average.read().evidence.float(), (~wrong).long()).item()
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
