"""The judge of labels, against Bayes' rule, repeated draws and planted errors."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import one_hot

from saflex_lightning.evidence.discriminant import TEMPERATURES, fit_discriminant
from saflex_lightning.evidence.labels import DECISIONS, LabelJudge
from saflex_lightning.evidence.weights import NOISE
from saflex_lightning.recipes.label_noise import plant_wrong_labels

CLASSES = 10


@pytest.fixture(scope="module")
def digits():
    """Pixels and labels, shuffled."""
    inputs, target = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    return inputs[order], target[order]


def plant(target, share):
    return plant_wrong_labels(target, CLASSES, share, torch.Generator().manual_seed(1))


def judge_digits(digits, share, trusted=200):
    inputs, target = digits
    given = plant(target[trusted:], share)
    judge = LabelJudge(inputs[:trusted], target[:trusted], CLASSES)
    found, error = judge.watch(inputs[trusted:], given)
    assert error < 0.06
    return judge.judge(inputs[trusted:], given), given, target[trusted:], found


def test_scores_are_those_of_bayes_rule(digits):
    """With one share of wrong labels known, by the posteriors of a discriminant alone."""
    inputs, target = digits[0][:60].double(), digits[1][:60]
    judge = LabelJudge(inputs, target, CLASSES)
    judge._shares = (
        one_hot(torch.tensor(NOISE.tolist().index(0.2)), len(NOISE)).double().expand(11, 1, -1)
    )
    given = plant(digits[1][60:100], 0.5)
    found = judge.judge(digits[0][60:100], given)
    order = target.argsort(stable=True)
    inputs, labels = inputs[order], one_hot(target[order], CLASSES).double()
    rows = inputs, torch.zeros_like(labels), labels, torch.ones(60).double()
    likelihood = dict.fromkeys(TEMPERATURES, 0.0)
    for row in range(60):  # of each row, by the folds that it is not in
        others = torch.arange(60) % 10 != row % 10
        logits = fit_discriminant(*(part[others] for part in rows)).logits(inputs[[row]])
        for tau in TEMPERATURES:
            likelihood[tau] += (tau * logits).log_softmax(1)[0, labels[row].argmax()].item()
    tau = max(likelihood, key=likelihood.get)
    posteriors = (tau * fit_discriminant(*rows).logits(digits[0][60:100].double())).softmax(1)
    right = posteriors[torch.arange(40), given]
    expected = 0.8 * right / (0.8 * right + 0.2 * (1 - right) / (CLASSES - 1))
    # A hundredth is left to the other shares.
    torch.testing.assert_close(found.score, expected, atol=0.01, rtol=0)
    assert expected.min() < 0.1 < 0.9 < expected.max()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_planted_labels_are_found_and_their_share(digits, share):
    judged, given, truth, found = judge_digits(digits, share)
    wrong = given != truth
    order = judged.score.argsort()
    assert wrong[order[: int(wrong.sum())]].float().mean() > 0.8
    assert abs(found - share) < 0.06
    assert abs(judged.score.mean() - (~wrong).float().mean()) < 0.07  # calibrated as a whole
    flagged = judged.decision != DECISIONS.index("keep")
    assert wrong[flagged].float().mean() > 0.9
    relabelled = judged.decision == DECISIONS.index("relabel")
    assert (judged.suggested == truth)[relabelled].float().mean() > 0.95


def test_right_labels_are_kept_and_still_have_an_order(digits):
    judged, _, _, found = judge_digits(digits, 0.0)
    assert found < 0.01
    assert (judged.decision == DECISIONS.index("keep")).all()
    assert len(judged.score.unique()) > 1000


@pytest.mark.parametrize("trusted", [100, 300])
def test_standard_errors_are_those_of_other_draws_of_trusted_rows(digits, trusted):
    inputs, target = digits
    pool, given = slice(-400, None), plant(target[-400:], 0.2)
    draws = torch.Generator().manual_seed(0)
    scores, errors = [], []
    for _ in range(12):
        rows = torch.randperm(len(target) - 400, generator=draws)[:trusted]
        judge = LabelJudge(inputs[rows], target[rows], CLASSES)
        judge.watch(inputs[pool], given)
        judged = judge.judge(inputs[pool], given)
        scores.append(judged.score)
        errors.append(judged.standard_error)
    spread = torch.stack(scores).var(0)
    claimed = torch.stack(errors).square().mean(0)
    assert 0.9 < (claimed.mean() / spread.mean()).sqrt() < 1.6  # a jackknife errs on the safe side
    assert torch.corrcoef(torch.stack([claimed, spread]))[0, 1] > 0.6


def test_a_score_has_the_same_meaning_whatever_the_order_and_the_scale(digits):
    inputs, target = digits
    given = plant(target[200:300], 0.3)
    first = LabelJudge(inputs[:200], target[:200], CLASSES)
    second = LabelJudge(7 * inputs[:200] - 3, target[:200], CLASSES)
    expected = first.judge(inputs[200:300], given)
    found = second.judge(7 * inputs[200:300] - 3, given)
    torch.testing.assert_close(found.score, expected.score)
    assert (found.suggested == expected.suggested).all()


def test_more_scores_than_trusted_rows(digits):
    """As an encoder's features; those of which the labels are no function do no harm."""
    inputs, target = digits
    wide = torch.cat([inputs, 0.1 * torch.randn(len(inputs), 900)], 1)
    given = plant(target[200:], 0.2)
    judge = LabelJudge(wide[:200], target[:200], CLASSES)
    judge.watch(wide[200:], given)
    score = judge.judge(wide[200:], given).score
    wrong = given != target[200:]
    assert wrong[score.argsort()[: int(wrong.sum())]].float().mean() > 0.8


def test_scores_that_tell_nothing_say_so(digits):
    noise = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    judge = LabelJudge(noise[:200], digits[1][:200], CLASSES)
    _, error = judge.watch(noise[200:], digits[1][200:400])
    assert error > 0.2


@pytest.mark.parametrize("rows", [1, 2, 3, 12])
def test_few_trusted_rows_and_classes_without_one(rows):
    scores = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    judge = LabelJudge(scores, torch.arange(rows) % 3, 5)
    judge.watch(scores, torch.zeros(rows, dtype=torch.long))
    judged = judge.judge(1e3 * scores, torch.full((rows,), 4))
    assert all(part.isfinite().all() for part in judged)
    assert ((judged.score >= 0) & (judged.score <= 1)).all()
