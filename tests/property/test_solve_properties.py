"""What the solve promises for every batch, looked for by Hypothesis in float64."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.solving import solve
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from saflex_lightning.functional.losses import dense_target
from saflex_lightning.functional.settings import Settings
from saflex_lightning.functional.solve import SAflexSolution, learned_labels

quick = settings(deadline=None, derandomize=True, max_examples=40)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Batch:
    """Arguments of one solve."""

    jvp: Tensor
    probs: Tensor
    target: Tensor
    augmented: Tensor

    @property
    def labels(self) -> Tensor:
        return dense_target(self.target, self.probs.shape[-1], self.probs.dtype)

    def solve(self, **options) -> SAflexSolution:
        return solve(self.jvp, self.probs, self.target, self.augmented, **options)


def matrices(rows: int, columns: int, bound: float) -> st.SearchStrategy[Tensor]:
    # Multiples of 1/16: sums over a row are exact, and ties and zeros are common.
    sixteenths = st.integers(int(-16 * bound), int(16 * bound)).map(lambda n: n / 16)
    return arrays(np.float64, (rows, columns), elements=sixteenths).map(torch.from_numpy)


@st.composite
def batches(
    draw, *, rows=(1, 7), classes=(1, 5), bound: float = 50.0, soft: bool | None = None
) -> Batch:
    num_rows, num_classes = draw(st.integers(*rows)), draw(st.integers(*classes))
    labels = st.lists(st.integers(0, num_classes - 1), min_size=num_rows, max_size=num_rows).map(
        torch.tensor
    )
    target = draw(labels)
    if draw(st.booleans()) if soft is None else soft:
        share = draw(st.sampled_from([0.0, 0.25, 0.5, 0.9]))
        first = F.one_hot(target, num_classes).double()
        target = (1 - share) * first + share * F.one_hot(draw(labels), num_classes).double()
    mask = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows).map(torch.tensor)
    return Batch(
        draw(matrices(num_rows, num_classes, bound)),
        draw(matrices(num_rows, num_classes, 4.0)).softmax(-1),
        target,
        draw(mask),
    )


# Every rule with and without normalisation; argmax is left to the tests that allow for ties.
OPTIONS = st.fixed_dictionaries(
    {
        "score_space": st.sampled_from(["log_probs", "probs", "logits"]),
        "normalize": st.booleans(),
        "label_rule": st.sampled_from(["auto", "softmax", "keep"]),
        "label_penalty": st.sampled_from([0.0, 1.0, 8.0]),
        "temperature": st.sampled_from([0.01, 0.5, 2.0]),
        "weight_rule": st.sampled_from(["sigmoid", "expected", "sum", "positive", "ones"]),
        "balance_classes": st.booleans(),
    }
)


@quick
@given(batches(), OPTIONS, st.booleans())
def test_labels_are_distributions_and_weights_sum_to_their_number(batch, options, gumbel) -> None:
    generator = torch.Generator().manual_seed(0)
    solution = batch.solve(**options, gumbel=gumbel, generator=generator)
    number = float(batch.augmented.sum())

    assert not solution.failed
    assert (solution.soft_labels >= 0).all()
    torch.testing.assert_close(solution.soft_labels.sum(-1), torch.ones(len(batch.probs)).double())

    assert (solution.weights >= 0).all()
    assert (solution.weights[~batch.augmented] == 1).all()
    assert torch.equal(solution.soft_labels[~batch.augmented], batch.labels[~batch.augmented])
    total = solution.weights[batch.augmented].sum().item()
    assert total == pytest.approx(number) or total == 0


@quick
@given(batches(), st.sampled_from(["sigmoid", "ones"]))
def test_normalised_sigmoids_never_drop_a_whole_batch(batch, weight_rule) -> None:
    weights = batch.solve(weight_rule=weight_rule).weights[batch.augmented]
    assert weights.sum().item() == pytest.approx(float(len(weights)))
    assert (weights > 0).all()


@quick
@given(
    batches(soft=False, classes=(2, 5)),
    st.sampled_from(["softmax", "argmax"]),
    st.sampled_from([0.25, 2.0, 8.0]),
    st.sampled_from([0.05, 2.0]),
    st.booleans(),
)
def test_a_label_that_no_rival_leads_by_beta_keeps_its_argmax(
    batch, rule, penalty, temperature, normalize
) -> None:
    solution = batch.solve(
        label_rule=rule, label_penalty=penalty, temperature=temperature, normalize=normalize
    )
    products = solution.inner_products
    own = products.gather(1, batch.target.unsqueeze(-1)).squeeze(-1)
    lead = products.scatter(1, batch.target.unsqueeze(-1), -torch.inf).amax(-1) - own
    safe, lost = lead < penalty - 1e-6, (lead > penalty + 1e-6) & batch.augmented
    chosen = solution.soft_labels.argmax(-1)
    assert torch.equal(chosen[safe], batch.target[safe])
    assert (chosen[lost] != batch.target[lost]).all()


@quick
@given(st.integers(0, 10**6), st.integers(2, 48), st.floats(1.0, 4.0), st.floats(0.1, 4.0))
def test_weights_keep_their_spread_with_more_classes_than_rows(seed, rows, ratio, spread) -> None:
    # Without the pseudo-rows of the class renormalisation each lone row would get weight 1.
    classes = round(ratio * rows)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    arguments = (spread * draw[0], (2 * draw[1]).softmax(-1), target)
    renormalised = solve(*arguments).weights
    before = solve(*arguments, balance_classes=False).weights
    assert before.mean().item() == pytest.approx(1.0)
    assert renormalised.mean().item() == pytest.approx(1.0)
    assert renormalised.std() >= 0.6 * before.std()


def away_from_thresholds(batch: Batch, solution: SAflexSolution, options: dict) -> bool:
    """Say whether no kept or dropped row would flip by rounding."""
    products = solution.inner_products[batch.augmented]
    score = {
        "expected": (products * solution.soft_labels[batch.augmented]).sum(-1),
        "sum": products.sum(-1),
        "positive": (products * batch.labels[batch.augmented]).sum(-1),
    }.get(options["weight_rule"], torch.ones(1))
    sure = bool((score.abs() > 1e-7).all())
    # Where every product is rounding noise, dividing by its size would blow it up.
    return sure and bool(solution.inner_product_rms > 1e-7)


@quick
@given(batches(), OPTIONS, st.randoms(use_true_random=False))
def test_permuting_samples_permutes_the_solution(batch, options, random) -> None:
    solution = batch.solve(**options)
    assume(away_from_thresholds(batch, solution, options))
    order = random.sample(range(len(batch.probs)), len(batch.probs))
    permuted = Batch(
        batch.jvp[order], batch.probs[order], batch.target[order], batch.augmented[order]
    ).solve(**options)
    torch.testing.assert_close(permuted.weights, solution.weights[order], **CLOSE)
    torch.testing.assert_close(permuted.soft_labels, solution.soft_labels[order], **CLOSE)


@quick
@given(batches(), OPTIONS, st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2]))
def test_permuting_classes_permutes_the_labels(batch, options, random, smoothing) -> None:
    options = {**options, "label_smoothing": smoothing}
    class_weight = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25]).double()[: batch.probs.shape[-1]]
    solution = batch.solve(**options, class_weight=class_weight)
    assume(away_from_thresholds(batch, solution, options))
    order = random.sample(range(batch.probs.shape[-1]), batch.probs.shape[-1])
    if batch.target.ndim == 2:
        target = batch.target[:, order]
    else:
        target = torch.tensor([order.index(label) for label in batch.target.tolist()])
    permuted = Batch(batch.jvp[:, order], batch.probs[:, order], target, batch.augmented).solve(
        **options, class_weight=class_weight[order]
    )
    torch.testing.assert_close(permuted.weights, solution.weights, **CLOSE)
    torch.testing.assert_close(permuted.soft_labels, solution.soft_labels[:, order], **CLOSE)


@quick
@given(batches(), OPTIONS, st.data())
def test_a_constant_added_to_a_row_of_the_jvp_changes_nothing(batch, options, data) -> None:
    options = {**options, "score_space": data.draw(st.sampled_from(["log_probs", "probs"]))}
    solution = batch.solve(**options)
    sums_to_zero = options["score_space"] == "probs" and options["weight_rule"] == "sum"
    assume(not sums_to_zero and away_from_thresholds(batch, solution, options))
    shift = data.draw(matrices(len(batch.probs), 1, 20.0))
    shifted = replace(batch, jvp=batch.jvp + shift).solve(**options)
    torch.testing.assert_close(shifted.weights, solution.weights, **CLOSE)
    torch.testing.assert_close(shifted.soft_labels, solution.soft_labels, **CLOSE)
    torch.testing.assert_close(shifted.inner_products, solution.inner_products, **CLOSE)


@quick
@given(batches(soft=False), st.sampled_from(["softmax", "argmax"]), st.booleans())
def test_more_labels_are_kept_as_the_penalty_grows(batch, rule, normalize) -> None:
    def kept(penalty: float) -> Tensor:
        labels = batch.solve(label_rule=rule, label_penalty=penalty, normalize=normalize)
        return labels.soft_labels.argmax(-1) == batch.target

    path = [kept(penalty) for penalty in (0.0, 0.1, 0.5, 1.0, 2.0, 8.0, 1000.0)]
    for smaller, larger in pairwise(path):
        assert (larger | ~smaller).all()
    assert path[-1].all()


@quick
@given(batches(classes=(2, 5)), st.sampled_from([0.0, 3.0]), st.booleans())
def test_the_limit_of_low_temperature_is_argmax(batch, penalty, normalize) -> None:
    options = {"label_penalty": penalty, "normalize": normalize}
    hard = batch.solve(label_rule="argmax", **options)
    objective = hard.inner_products + penalty * batch.labels
    best = objective.topk(2).values
    clear = (best[:, 0] - best[:, 1] > 1e-3) & batch.augmented
    cold = batch.solve(label_rule="softmax", temperature=1e-5, **options)
    torch.testing.assert_close(cold.soft_labels[clear], hard.soft_labels[clear], **CLOSE)
    warm = batch.solve(label_rule="softmax", temperature=1e5, **options)
    uniform = torch.full_like(warm.soft_labels, 1 / batch.probs.shape[-1])
    torch.testing.assert_close(
        warm.soft_labels[batch.augmented], uniform[batch.augmented], atol=1e-2, rtol=0
    )


@quick
@given(batches(), st.booleans())
def test_products_of_log_probabilities_average_to_zero(batch, normalize) -> None:
    products = batch.solve(normalize=normalize).inner_products
    average = (batch.probs * products).sum(-1)
    torch.testing.assert_close(average, torch.zeros_like(average), **CLOSE)
    # so the best label of Algorithm 1 without penalty never raises the validation loss
    assert (products.amax(-1) >= -1e-9).all()


@quick
@given(batches(), st.booleans())
def test_products_of_probabilities_sum_to_zero(batch, normalize) -> None:
    products = batch.solve(normalize=normalize, score_space="probs").inner_products
    torch.testing.assert_close(products.sum(-1), torch.zeros(len(products)).double(), **CLOSE)


@quick
@given(batches(), st.floats(0.01, 100.0))
def test_the_default_does_not_depend_on_the_size_of_the_jvp(batch, factor) -> None:
    solution = batch.solve()
    assume(solution.inner_product_rms > 1e-7)
    scaled = replace(batch, jvp=factor * batch.jvp).solve()
    torch.testing.assert_close(scaled.weights, solution.weights, **CLOSE)
    torch.testing.assert_close(scaled.soft_labels, solution.soft_labels, **CLOSE)
    rms = factor * solution.inner_product_rms
    torch.testing.assert_close(scaled.inner_product_rms, rms, **CLOSE)


# Every case of the design's list has a defined result.


@quick
@given(batches(rows=(1, 1)), st.sampled_from(["sigmoid", "expected", "sum", "ones"]))
def test_one_row_is_trained_with_weight_1_and_prior_label(batch, weight_rule) -> None:
    # Centred over one row, Z is 0, and nothing is known beyond the label.
    solution = batch.solve(weight_rule=weight_rule)
    assert torch.equal(solution.inner_products, torch.zeros_like(batch.probs))
    assert solution.weights.tolist() == [1.0]
    prior = (8.0 * batch.labels / 2.0).softmax(-1)
    expected = prior if batch.augmented[0] and batch.probs.shape[-1] > 2 else batch.labels
    torch.testing.assert_close(solution.soft_labels, expected)


@quick
@given(batches(classes=(1, 1)), OPTIONS)
def test_one_class_has_nothing_to_learn(batch, options) -> None:
    solution = batch.solve(**{**options, "score_space": "log_probs"})
    assert torch.equal(solution.inner_products, torch.zeros_like(batch.probs))
    assert torch.equal(solution.soft_labels, torch.ones_like(batch.probs))
    # In proportion to nothing there are no weights.
    dropped = batch.augmented & (options["weight_rule"] == "positive")
    torch.testing.assert_close(solution.weights, (~dropped).double())


@quick
@given(batches(classes=(2, 2)))
def test_two_classes_keep_their_labels_by_default(batch) -> None:
    assert torch.equal(batch.solve().soft_labels, batch.labels)


@quick
@given(batches(), OPTIONS, st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_a_non_finite_number_gives_weights_1_and_own_labels(batch, options, value, data) -> None:
    row = data.draw(st.integers(0, len(batch.probs) - 1))
    column = data.draw(st.integers(0, batch.probs.shape[-1] - 1))
    field = data.draw(st.sampled_from(["jvp", "probs"]))
    broken = getattr(batch, field).clone()
    broken[row, column] = value
    if field == "probs" and value == torch.inf and options["score_space"] != "logits":
        assume(batch.jvp[row].abs().min() > 0)
    solution = replace(batch, **{field: broken}).solve(**options)
    ignored = not batch.augmented[row] or (field == "probs" and options["score_space"] == "logits")
    if ignored:
        expected = batch.solve(**options)
        assert not solution.failed
        assert torch.equal(solution.weights, expected.weights)
    else:
        assert solution.failed
        assert torch.equal(solution.weights, torch.ones(len(batch.probs)).double())
        assert torch.equal(solution.soft_labels, batch.labels)


@quick
@given(batches(soft=False, classes=(3, 5)))
def test_a_class_that_is_absent_changes_no_weight(batch) -> None:
    # A class that nobody is labelled with and that the model rules out.
    options = {"normalize": False, "label_rule": "keep"}
    rows = len(batch.probs)
    wider = Batch(
        torch.cat([batch.jvp, torch.zeros(rows, 1)], 1),
        torch.cat([batch.probs, torch.zeros(rows, 1)], 1),
        batch.target,
        batch.augmented,
    )
    torch.testing.assert_close(
        wider.solve(**options).weights, batch.solve(**options).weights, **CLOSE
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rule", ["expected", "sum", "positive"])
def test_all_dropped_is_all_zero(rows, rule) -> None:
    # In logit space every product can be negative.
    solution = solve(
        torch.full((rows, 3), -1.0, dtype=torch.float64),
        torch.full((rows, 3), 1 / 3, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.int64),
        score_space="logits",
        normalize=False,
        weight_rule=rule,
    )
    assert not solution.failed
    assert torch.equal(solution.weights, torch.zeros(rows).double())


@quick
@given(batches(classes=(2, 5)), st.sampled_from([0.5, 2.0]), st.sampled_from([0.0, 4.0]))
def test_soft_labels_beat_every_other_distribution_in_their_own_objective(
    batch, temperature, penalty
) -> None:
    # softmax is the linear programme over labels with an entropy term of weight tau
    labels = learned_labels(
        batch.jvp / 10,
        batch.labels,
        Settings(label_rule="softmax", label_penalty=penalty, temperature=temperature),
    )

    def objective(distribution: Tensor) -> Tensor:
        reward = batch.jvp / 10 + penalty * batch.labels
        entropy = -torch.xlogy(distribution, distribution).sum(-1)
        return (distribution * reward).sum(-1) + temperature * entropy

    for rival in (batch.labels, batch.probs, torch.full_like(labels, 1 / labels.shape[-1])):
        assert (objective(labels) >= objective(rival) - 1e-9).all()
