"""Beliefs by Bayes' rule, and the ascent against autograd of what it ascends, in float64."""

from copy import deepcopy
from math import log

import numpy as np
import pytest
import torch
from helpers.solving import ALONE, in_parts
from torch.nn.functional import one_hot

from saflex_lightning.evidence.evidence import Evidence
from saflex_lightning.evidence.weights import NOISE, GroupWeights
from saflex_lightning.functional.losses import NO_OPTIONS, LossOptions

CPU = torch.device("cpu")
CLASSES, GROUPS = 5, 3


def bayes(posteriors, likelihoods):
    """Beliefs and log-likelihoods by loops; the likelihoods are those of the rows' groups."""
    found = []
    for q, known in zip(posteriors.tolist(), likelihoods.softmax(1).tolist(), strict=True):
        right, wrong = (
            [q * (1 - noise) for noise in NOISE],
            [(1 - q) * noise / (CLASSES - 1) for noise in NOISE],
        )
        belief = sum(p * r / (r + w) for p, r, w in zip(known, right, wrong, strict=True))
        found.append((belief, [log(r + w) for r, w in zip(right, wrong, strict=True)]))
    beliefs, told = zip(*found, strict=True)
    return torch.tensor(beliefs).double(), torch.tensor(told).double()


def test_beliefs_and_likelihoods_are_bayes_rule():
    rule = GroupWeights()
    rule.start(GROUPS)
    likelihoods = torch.randn(GROUPS, len(NOISE), generator=torch.Generator().manual_seed(0))
    rule.watch(likelihoods.double().numpy(), 1.0)
    rule._state["offsets"] = np.array([0.0, -0.3, 0.2])
    posteriors = torch.tensor([0.9, 0.5, 0.05, 0.7], dtype=torch.float64)
    group = torch.tensor([1, 1, 2, 2])
    log_v, own, told = rule.weigh(posteriors, group, CLASSES)
    beliefs, expected = bayes(posteriors, likelihoods[group])
    torch.testing.assert_close(told, expected)
    torch.testing.assert_close(own, 3 * beliefs.log())
    offsets = torch.tensor([-0.3, -0.3, 0.2, 0.2], dtype=torch.float64)
    torch.testing.assert_close(log_v, (own + offsets).clamp(max=0.7))


def test_all_rows_of_a_group_without_wrong_labels_are_believed():
    rule = GroupWeights()
    rule.start(2)
    certain = np.full((2, len(NOISE)), -1e3)
    certain[:, 0] = 0
    rule.watch(certain, 1.0)
    log_v, own, _ = rule.weigh(torch.tensor([0.9, 0.01]), torch.ones(2).long(), CLASSES)
    torch.testing.assert_close(own, torch.zeros(2))
    assert log_v.equal(own)


def test_a_label_that_tells_nothing_leaves_the_posterior():
    """The belief at a noise of 1 - 1/K is q itself."""
    rule = GroupWeights()
    rule.start(2)
    certain = np.full((2, len(NOISE)), -1e3)
    certain[:, NOISE.tolist().index(0.8)] = 0
    assert 1 - 1 / CLASSES == 0.8
    rule.watch(certain, 1.0)
    posteriors = 0.05 + 0.9 * torch.rand(7, dtype=torch.float64)
    own = rule.weigh(posteriors, torch.ones(7).long(), CLASSES)[1]
    torch.testing.assert_close(own, 3 * posteriors.log())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_the_share_of_wrong_labels_is_estimated(share):
    """From posteriors that are calibrated: right labels are drawn from them."""
    generator = torch.Generator().manual_seed(0)
    rule = GroupWeights()
    rule.start(2)
    for _ in range(200):
        probs = (4 * torch.randn(64, CLASSES, generator=generator)).softmax(1)
        given = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        wrong = torch.rand(64, generator=generator) < share
        shift = torch.randint(1, CLASSES, (64,), generator=generator)
        given = torch.where(wrong, (given + shift) % CLASSES, given)
        posteriors = probs.gather(1, given.unsqueeze(1)).squeeze(1)
        sums = np.zeros((2, len(NOISE)))
        sums[1] = rule.weigh(posteriors, torch.ones(64).long(), CLASSES)[2].sum(0)
        rule.watch(sums, 1.0)
    likelihoods = rule.state_dict()["likelihoods"][1]
    expected = (likelihoods.softmax(0) * torch.tensor(NOISE)).sum()
    assert rule.wrong_labels[1] == pytest.approx(expected.item())
    assert expected.item() == pytest.approx(share, abs=0.05)


def test_a_step_counts_by_what_validation_rows_tell_and_by_how_sure_clean_rows_are():
    """The log-likelihoods of steps, over the largest of their weights."""
    generator = np.random.default_rng(0)
    rule, told, weights = GroupWeights(), [], []
    rule.start(GROUPS)
    for worth, found, expected in [(0.2, 4, 2), (3, 2, 3), (0.5, 3, 3), (9, 1, 9), (2, 3, 3)]:
        rule._state["surprises"] = np.array([found, expected], dtype=float)
        told.append(generator.normal(size=(GROUPS, len(NOISE))))
        rule.watch(told[-1], worth)
        weights.append(worth * max(expected / found, 1) ** -6)
        wanted = sum(w * one for w, one in zip(weights, told, strict=True)) / max(weights)
        np.testing.assert_allclose(rule._state["likelihoods"], wanted)
    copy = GroupWeights()
    copy.load_state_dict(deepcopy(rule.state_dict()))
    for one in (rule, copy):
        one.watch(told[0], 0.1)
    np.testing.assert_array_equal(copy._state["likelihoods"], rule._state["likelihoods"])


def problem(seed=0, *, alone=False, dtype=torch.float64):
    """An evidence that remembers validation rows, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    evidence = Evidence()
    evidence.start(("clean", "one", "two"), 40, CPU)
    labels = torch.arange(40) % CLASSES
    scores = torch.randn(40, CLASSES, generator=generator, dtype=dtype)
    scores = scores + 2 * one_hot(labels, CLASSES)
    onehot = one_hot(labels, CLASSES).to(dtype)
    evidence.remember(0, scores, scores.softmax(1) - onehot, onehot, ALONE)
    evidence.is_alone = alone  # as the next validation rows would find
    size = 24
    batch = {
        "scores": 2 * torch.randn(size, CLASSES, generator=generator, dtype=dtype),
        "target": torch.randint(0, CLASSES, (size,), generator=generator),
        "augmented": torch.arange(size) >= (0 if alone else 8),
        "group": 1 + torch.arange(size) % 2,
        "index": torch.arange(size),
        "options": NO_OPTIONS,
    }
    return evidence, batch


def weigh(evidence, batch, number=500, ranks=ALONE):
    return evidence.weigh(number, *batch.values(), ranks)


@pytest.mark.parametrize(
    ("steps", "power"),
    [
        ([], 3),  # no row is clean
        ([(0.0, 0.0)], 3),
        ([(2.0, 3.0)], 4.5),
        ([(3.0, 2.0)], 3),  # clean rows surprise more than validation rows
        ([(0.01, 5.0)], 10),
        ([(8.0, 8.0), *[(1.0, 2.0)] * 300], 6),  # what is long past has faded
    ],
)
def test_the_power_grows_with_how_much_surer_the_network_is_of_its_own_rows(steps, power):
    rule = GroupWeights()
    for found, expected in steps:
        rule.compare(found, expected)
    assert rule.power == pytest.approx(power, abs=0.01)


def test_surprises_are_those_of_clean_and_of_validation_rows():
    evidence, batch = problem()
    seen = []
    evidence.rule.compare = lambda *told: seen.append(told)
    weigh(evidence, batch)
    clean = evidence.judge(batch["scores"], batch["target"], NO_OPTIONS).posteriors[:8]
    scores, _, labels, _ = evidence.memory.read()
    remembered = evidence.judge(scores, labels, NO_OPTIONS).posteriors
    ((found, expected),) = seen
    assert found == pytest.approx(-clean.log().sum().item())
    assert expected == pytest.approx(8 * -remembered.log().mean().item())


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_the_ascent_is_along_the_gradient_of_the_weighted_evidence(target):
    evidence, batch = problem()
    if target == "soft":
        batch["target"] = torch.rand(24, CLASSES, dtype=torch.float64).softmax(1)
    state = evidence.rule._state
    state["offsets"] = np.array([0.0, -0.4, 0.1])
    likelihoods = torch.randn(3, len(NOISE), generator=torch.Generator().manual_seed(1)).double()
    evidence.rule.watch(likelihoods.numpy(), 1.0)
    evidence.rule.compare(0.4, 0.6)
    seen = {}
    evidence.rule.ascend = lambda gradient: seen.update(offsets=gradient)
    averages = deepcopy(evidence.averages)
    rows = weigh(evidence, batch)

    labels = batch["target"]
    labels = one_hot(labels, CLASSES).double() if labels.ndim == 1 else labels
    judgement = evidence.judge(batch["scores"], batch["target"], NO_OPTIONS)
    q = averages.update(batch["index"], judgement.posteriors, ~batch["augmented"], ALONE, 1.0)
    q = q.clamp(1e-4, 1 - 1e-4)
    rms = judgement.products.square().mean().sqrt()
    s = (labels * judgement.products).sum(1) / rms
    b = torch.tensor(state["offsets"], requires_grad=True)
    log_v = 4.5 * bayes(q, likelihoods[batch["group"]])[0].log() + b[batch["group"]]
    v = torch.where(batch["augmented"], log_v, 0).exp()
    assert v.max() < 2.01, "no weight is capped, where the gradient would be another"
    m = (v * s).sum() / v.sum()
    (slope,) = torch.autograd.grad(m, b)
    torch.testing.assert_close(rows.weights, v.detach())
    torch.testing.assert_close(rows.inner_product_rms, rms)
    torch.testing.assert_close(torch.from_numpy(seen["offsets"])[1:], slope[1:])
    assert seen["offsets"][0] == 0


def test_the_step_is_that_of_torch_s_adam():
    rule = GroupWeights()
    rule.start(GROUPS)
    b = torch.zeros(GROUPS).double().requires_grad_()
    optimizer = torch.optim.Adam([b], 0.02, maximize=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        b.grad = torch.randn(GROUPS, generator=generator).double()
        rule.ascend(b.grad.numpy())
        optimizer.step()
    torch.testing.assert_close(rule.state_dict()["offsets"], b.detach())


def test_clean_rows_count_in_full_and_nothing_is_learned_of_them():
    evidence, batch = problem()
    for number in range(100, 130):
        rows = weigh(evidence, batch, number)
        assert rows.weights[:8].eq(1).all()
        assert rows.inner_products[:8].eq(0).all()
        assert rows.weights.max() <= 2.02
    assert evidence.rule._state["offsets"][0] == 0
    assert evidence.rule._state["offsets"][1] != 0
    assert not evidence.rule._state["likelihoods"][0].any()


def test_rows_that_stand_alone_all_count_until_their_noise_is_known():
    """For a hundred steps, and the offsets of groups stay 0."""
    evidence, batch = problem(alone=True)
    assert weigh(evidence, batch, 99).weights.eq(1).all()
    later = weigh(evidence, batch, 100).weights
    assert later.std() > 0.05
    assert not evidence.rule._state["offsets"].any()
    assert not evidence.groups.read()[0].any()


def test_ranks_learn_from_the_whole_batch():
    for _ in range(2):
        evidence, batch = problem()
        whole = [weigh(evidence, batch, number) for number in (100, 101)]

        def work(own, ranks):
            evidence, batch = problem()
            part = {
                name: value[own] if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            found = [weigh(evidence, part, number, ranks) for number in (100, 101)]
            return [one.weights for one in found], evidence.state_dict()

        parts = in_parts([15, 9], work)
        for step in (0, 1):
            found = torch.cat([weights[step] for weights, _ in parts])
            torch.testing.assert_close(found, whole[step].weights)
        for _, state in parts:
            for name in ("offsets", "gates", "likelihoods", "surprises"):
                torch.testing.assert_close(state["rule"][name], evidence.state_dict()["rule"][name])


def test_a_restored_evidence_goes_on_alike():
    evidence, batch = problem()
    for number in range(100, 105):
        weigh(evidence, batch, number)
    copy = Evidence()
    copy.load_state_dict(deepcopy(evidence.state_dict()))
    copy.start(("clean", "one", "two"), 40, CPU)
    for number in range(105, 110):
        found, expected = weigh(copy, batch, number), weigh(evidence, batch, number)
        for name in ("weights", "beliefs", "inner_products", "suggested", "failed"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_rows_that_are_not_finite_teach_nothing():
    evidence, batch = problem()
    other, _ = problem()
    spoiled = {**batch, "scores": batch["scores"].clone()}
    spoiled["scores"][12] = torch.nan
    rows = weigh(evidence, spoiled)
    assert rows.failed
    assert rows.weights[12] == 1
    kept = [i for i in range(24) if i != 12]
    part = {n: v[kept] if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    expected = weigh(other, part)
    torch.testing.assert_close(rows.weights[kept], expected.weights)
    for name, value in other.rule.state_dict().items():
        found = evidence.rule.state_dict()[name]
        torch.testing.assert_close(found, value)


def test_class_weights_enter_the_products():
    evidence, batch = problem()
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
    plain = weigh(evidence, batch)
    weighted = weigh(problem()[0], {**batch, "options": LossOptions(weight)})
    rows = batch["augmented"]
    expected = plain.inner_products * plain.inner_product_rms * weight
    torch.testing.assert_close(
        weighted.inner_products[rows] * weighted.inner_product_rms, expected[rows]
    )


def test_a_batch_without_rows():
    evidence, batch = problem()
    empty = {n: v[:0] if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    rows = weigh(evidence, empty)
    assert rows.weights.shape == (0,)
    assert not rows.failed


def test_without_validation_rows_nothing_is_said():
    evidence = Evidence()
    evidence.start((), 40, CPU)
    assert weigh(evidence, problem()[1]) is None


@pytest.mark.parametrize(("group", "row"), [(0, 9), (3, 10)])
def test_a_group_that_cannot_be_is_named_with_its_row(group, row):
    evidence, batch = problem()
    batch["group"][row] = group
    with pytest.raises(
        ValueError, match=rf"in 1 to 2, as there are 3 group.* got {group} in row {row}"
    ):
        weigh(evidence, batch)


def test_clean_rows_are_noticed_with_the_next_validation_rows():
    evidence, batch = problem()
    evidence.is_alone = True
    weigh(evidence, batch)
    rows = evidence.memory.read()
    assert evidence.is_alone
    evidence.remember(1, *(part[:4] for part in rows[:3]), ALONE)
    assert not evidence.is_alone


def test_a_step_without_rows_to_judge_changes_nothing():
    evidence, batch = problem()
    for number in range(20, 25):
        weigh(evidence, batch, number)
    before = deepcopy(evidence.rule.state_dict())
    weigh(evidence, {**batch, "augmented": torch.zeros(24, dtype=torch.bool)}, 25)
    for name, value in evidence.rule.state_dict().items():
        assert np.array_equal(value, before[name]), name


def test_gates_close_and_open_within_their_bounds():
    rule = GroupWeights()
    rule.start(GROUPS)
    posteriors, group = torch.full((3,), 0.9).double(), torch.arange(3)
    before, own, _ = rule.weigh(posteriors, group, CLASSES)
    for _ in range(10):
        rule.move_gates(np.array([0.0, 1.0, -1.0]))
    after, own_after, _ = rule.weigh(posteriors, group, CLASSES)
    torch.testing.assert_close(after - before, torch.tensor([0, 0, -2.0]).double())
    assert own.equal(own_after), "so that a closed group can show that it has become better"
    for _ in range(50):
        rule.move_gates(np.array([0.0, 0.0, -1.0]))
    assert rule.state_dict()["gates"].tolist() == [0, 0, -6]
    for _ in range(50):
        rule.move_gates(np.array([0.0, 0.0, 1.0]))
    assert rule.weigh(posteriors, group, CLASSES)[0].equal(before)
