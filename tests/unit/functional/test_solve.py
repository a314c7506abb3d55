"""Each rule of the solve by hand, the class renormalisation by loops, and shared batches."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import dense_jacobian, dense_val_gradient, make_problem
from helpers.solving import in_parts, solve
from torch import Tensor

from saflex_lightning.functional.losses import dense_target
from saflex_lightning.functional.reference import inner_products_reference
from saflex_lightning.functional.settings import Settings
from saflex_lightning.functional.solve import (
    inner_products,
    learned_labels,
    learned_weights,
    loss_inner_products,
)

# One row to compute by hand: mean of Z under p is 1, so Pi is Z - 1.
JVP = torch.tensor([[4.0, 0.0, -4.0]])
PROBS = torch.tensor([[0.5, 0.25, 0.25]])
PRODUCTS = torch.tensor([[3.0, -1.0, -5.0]])
plain_solve = partial(solve, normalize=False)


def make_batch(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw Z, probabilities and labels, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    return draw[0], (2 * draw[1]).softmax(-1), target


def mix_targets(target: Tensor, classes: int, seed: int = 0) -> Tensor:
    """Mix each label with its neighbour's, as Mixup does."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(target), 1, generator=generator, dtype=torch.float64)
    dense = F.one_hot(target, classes).double()
    return share * dense + (1 - share) * dense.roll(1, 0)


class TestScoreSpaces:
    @pytest.mark.parametrize(
        ("score_space", "expected"),
        [
            ("log_probs", [[3.0, -1.0, -5.0]]),
            ("probs", [[1.5, -0.25, -1.25]]),
            ("logits", [[4.0, 0.0, -4.0]]),
        ],
    )
    def test_by_hand(self, score_space, expected) -> None:
        assert inner_products(JVP, PROBS, score_space).tolist() == expected
        solution = plain_solve(JVP, PROBS, torch.tensor([1]), score_space=score_space)
        assert solution.inner_products.tolist() == expected
        rms = math.sqrt(sum(entry**2 for entry in expected[0]) / 3)
        assert solution.inner_product_rms.item() == pytest.approx(rms)

    @pytest.mark.parametrize("score_space", ["log_probs", "probs", "logits"])
    def test_normalised_products_are_centred_and_of_unit_size(self, score_space) -> None:
        jvp, probs, target = make_batch(6, 3)
        augmented = torch.tensor([True, False, True, True, True, False])
        jvp[1] = 1e6  # a clean row must not shift the centre
        solution = solve(jvp, probs, target, augmented, score_space=score_space)
        centred = jvp[augmented] - jvp[augmented].mean(0)
        expected = inner_products(centred, probs[augmented], score_space)
        rms = expected.square().mean().sqrt()
        torch.testing.assert_close(solution.inner_products[augmented], expected / rms)
        torch.testing.assert_close(solution.inner_product_rms, rms)
        assert torch.equal(solution.inner_products[~augmented], torch.zeros(2, 3).double())


class TestLabelRules:
    @pytest.mark.parametrize(
        ("rule", "penalty", "temperature", "objective"),
        [
            ("softmax", 0.0, 1.0, [3.0, -1.0, -5.0]),
            ("softmax", 8.0, 2.0, [1.5, 3.5, -2.5]),
            ("softmax", 2.0, 0.5, [6.0, 2.0, -10.0]),
            ("auto", 8.0, 2.0, [1.5, 3.5, -2.5]),
        ],
    )
    def test_softmax_by_hand(self, rule, penalty, temperature, objective) -> None:
        solution = plain_solve(
            JVP,
            PROBS,
            torch.tensor([1]),
            label_rule=rule,
            label_penalty=penalty,
            temperature=temperature,
        )
        exponentials = [math.exp(entry) for entry in objective]
        expected = [entry / sum(exponentials) for entry in exponentials]
        assert solution.soft_labels[0].tolist() == pytest.approx(expected)

    @pytest.mark.parametrize(("penalty", "winner"), [(0.0, 0), (3.9, 0), (4.1, 1)])
    def test_argmax_leaves_the_label_when_a_rival_leads_by_more_than_beta(
        self, penalty, winner
    ) -> None:
        solution = plain_solve(
            JVP, PROBS, torch.tensor([1]), label_rule="argmax", label_penalty=penalty
        )
        assert solution.soft_labels.tolist() == [[float(k == winner) for k in range(3)]]

    def test_penalty_of_a_mixed_label_is_shared_as_the_label_is(self) -> None:
        target = torch.tensor([[0.0, 0.75, 0.25]])
        labels = learned_labels(
            PRODUCTS, target, Settings(label_rule="softmax", label_penalty=4.0, temperature=1.0)
        )
        expected = torch.tensor([[3.0, -1.0 + 3.0, -5.0 + 1.0]]).softmax(-1)
        torch.testing.assert_close(labels, expected)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-42, 1e-300])
    def test_no_temperature_is_too_low_for_float32(self, temperature) -> None:
        products = torch.tensor([[3.0, -1.0, 3.0], [-1e18, 0.0, -1.0]])
        found = learned_labels(
            products,
            torch.eye(3)[:2],
            Settings(label_rule="softmax", label_penalty=0.0, temperature=temperature),
        )
        assert found.tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]

    def test_no_penalty_is_too_high_for_float32(self) -> None:
        settings = Settings(label_rule="softmax", label_penalty=1e37, temperature=0.01)
        assert torch.equal(learned_labels(PRODUCTS, torch.eye(3)[1:2], settings), torch.eye(3)[1:2])

    def test_keep_returns_hard_and_mixed_labels_untouched(self) -> None:
        mixed = torch.tensor([[0.2, 0.3, 0.5]])
        for target in (mixed, torch.tensor([2])):
            solution = plain_solve(JVP, PROBS, target, label_rule="keep")
            assert torch.equal(solution.soft_labels, dense_target(target, 3, torch.float32))

    def test_auto_keeps_two_classes_and_learns_three(self) -> None:
        jvp, probs, target = make_batch(5, 2)
        kept = solve(jvp, probs, target).soft_labels
        assert torch.equal(kept, F.one_hot(target, 2).double())
        learned = solve(jvp, probs, target, label_rule="softmax").soft_labels
        assert ((learned > 0) & (learned < 1)).all()
        jvp, probs, target = make_batch(5, 3)
        assert torch.equal(
            solve(jvp, probs, target).soft_labels,
            solve(jvp, probs, target, label_rule="softmax").soft_labels,
        )

    def test_noise_moves_the_label_as_much_as_the_products(self) -> None:
        noise = torch.tensor([[0.0, 10.0, 0.0]])
        labels = learned_labels(
            PRODUCTS,
            torch.zeros(1, 3),
            Settings(label_rule="argmax", label_penalty=0.0, temperature=1.0),
            noise,
        )
        assert labels.tolist() == [[0.0, 1.0, 0.0]]


class TestGumbel:
    def test_labels_are_drawn_from_the_softmax_of_the_products(self) -> None:
        # The Gumbel-max trick: argmax of (Pi + standard Gumbel) has probabilities softmax(Pi).
        rows = 40_000
        jvp, probs = torch.tensor([[1.0, 0.0, -1.0]]), torch.full((1, 3), 1 / 3)
        solution = plain_solve(
            jvp.repeat(rows, 1),
            probs.repeat(rows, 1),
            torch.zeros(rows, dtype=torch.int64),
            label_rule="argmax",
            label_penalty=0.0,
            gumbel=True,
            generator=torch.Generator().manual_seed(0),
        )
        drawn = solution.soft_labels.mean(0)
        torch.testing.assert_close(drawn, jvp[0].softmax(-1), atol=0.008, rtol=0)

    def test_noise_comes_from_the_generator_alone(self) -> None:
        jvp, probs, target = make_batch(6, 4)

        def labels(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return solve(jvp, probs, target, gumbel=True, generator=generator).soft_labels

        before = torch.get_rng_state()
        first, again, other = labels(1), labels(1), labels(2)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)

    def test_without_generator_the_global_one_is_used(self) -> None:
        jvp, probs, target = make_batch(6, 4)
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(3)
            implicit = solve(jvp, probs, target, gumbel=True).soft_labels
        finally:
            torch.random.set_rng_state(state)
        generator = torch.Generator().manual_seed(3)
        explicit = solve(jvp, probs, target, gumbel=True, generator=generator).soft_labels
        assert torch.equal(implicit, explicit)

    def test_weights_of_algorithm_1_use_the_noisy_label(self) -> None:
        noisy = plain_solve(
            JVP.repeat(200, 1),
            PROBS.repeat(200, 1),
            torch.zeros(200, dtype=torch.int64),
            label_rule="softmax",
            label_penalty=0.0,
            temperature=0.01,
            gumbel=True,
            weight_rule="expected",
            generator=torch.Generator().manual_seed(0),
        )
        chosen = noisy.soft_labels.argmax(-1)
        assert 0 < (chosen == 1).sum() < 200
        assert (noisy.weights[chosen == 0] > 0).all()
        sure = noisy.soft_labels.max(-1).values > 0.99  # near a tie the label may be a mixture
        assert (noisy.weights[sure & (chosen != 0)] == 0).all()


class TestWeightRules:
    products = torch.tensor([[2.0, -2.0], [-1.0, 0.5], [0.5, -3.0], [0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    every = torch.ones(4, dtype=torch.bool)

    def test_expected_reads_the_learned_label(self) -> None:
        learned = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
        weights = learned_weights(
            self.products, self.labels, learned, self.every, Settings(weight_rule="expected")
        )
        # Pi . y = 0, -0.25, 0.5, 0: a row at exactly zero is kept
        assert weights.tolist() == pytest.approx([4 / 3, 0.0, 4 / 3, 4 / 3])

    def test_sum_adds_the_products_of_all_classes(self) -> None:
        weights = learned_weights(
            self.products, self.labels, self.labels, self.every, Settings(weight_rule="sum")
        )
        # sums are 0, -0.5, -2.5, 0
        assert weights.tolist() == [2.0, 0.0, 0.0, 2.0]

    def test_ones(self) -> None:
        weights = learned_weights(
            self.products, self.labels, self.labels, self.every, Settings(weight_rule="ones")
        )
        assert weights.tolist() == [1.0] * 4

    def test_sigmoid_reads_the_upstream_label(self) -> None:
        learned = self.labels.flip(-1)
        weights = learned_weights(
            self.products,
            self.labels,
            learned,
            self.every,
            Settings(weight_rule="sigmoid"),
            balance_classes=False,
        )
        keep = [1 / (1 + math.exp(-given)) for given in (2.0, -1.0, -3.0, 0.0)]
        assert weights.tolist() == pytest.approx([4 * s / sum(keep) for s in keep])

    def test_sigmoid_of_a_mixed_label(self) -> None:
        weights = learned_weights(
            torch.tensor([[2.0, -2.0], [0.0, 0.0]]),
            torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
            torch.zeros(2, 2),
            torch.ones(2, dtype=torch.bool),
            Settings(weight_rule="sigmoid"),
            balance_classes=False,
        )
        first = 1 / (1 + math.exp(-1.0))  # 0.75 * 2 - 0.25 * 2
        assert weights.tolist() == pytest.approx(
            [2 * first / (first + 0.5), 2 * 0.5 / (first + 0.5)]
        )

    def test_rows_that_are_not_augmented_do_not_count(self) -> None:
        augmented = torch.tensor([True, True, False, False])
        weights = learned_weights(
            self.products, self.labels, self.labels, augmented, Settings(weight_rule="expected")
        )
        assert weights[:2].tolist() == [2.0, 0.0]

    @pytest.mark.parametrize("rule", ["sigmoid", "expected", "sum", "positive", "ones"])
    def test_without_augmented_rows_all_are_0(self, rule) -> None:
        none = torch.zeros(4, dtype=torch.bool)
        weights = learned_weights(
            self.products, self.labels, self.labels, none, Settings(weight_rule=rule)
        )
        assert weights.tolist() == [0.0] * 4

    def test_weights_of_tiny_sigmoids_still_sum_to_their_number(self) -> None:
        # Without `normalize` products of -40 are common; their sigmoids are around 1e-18.
        solution = plain_solve(
            torch.tensor([[-80.0, 0.0], [-82.0, 0.0], [-84.0, 0.0]]),
            torch.full((3, 2), 0.5),
            torch.zeros(3, dtype=torch.int64),
        )
        keep = torch.tensor([1.0, math.exp(-1), math.exp(-2)])
        torch.testing.assert_close(solution.weights, 3 * keep / keep.sum())

    @pytest.mark.parametrize("rule", ["expected", "sum", "sigmoid"])
    def test_all_dropped_is_all_zero(self, rule) -> None:
        # exp(-200) is 0 in float32, so even the sigmoid drops these rows
        products = torch.full((3, 3), -200.0)
        labels = torch.eye(3)
        weights = learned_weights(
            products, labels, labels, torch.ones(3, dtype=torch.bool), Settings(weight_rule=rule)
        )
        assert weights.tolist() == [0.0] * 3


def looped_balance(keep: list[float], labels: list[list[float]]) -> list[float]:
    """Renormalise classes with loops over numbers, as section 3 of the design writes it."""
    rows, classes = range(len(keep)), range(len(labels[0]))
    mean = sum(keep) / len(keep)
    weights = []
    for i in rows:
        factor = 0.0
        for k in classes:
            number = sum(labels[j][k] for j in rows)
            weight = sum(keep[j] * labels[j][k] for j in rows)
            factor += labels[i][k] * min(5.0, (number + 4.0) / (weight + 4.0 * mean))
        weights.append(keep[i] * factor)
    return [weight * len(keep) / sum(weights) for weight in weights]


class TestClassRenormalisation:
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize(("rows", "classes"), [(1, 3), (2, 2), (7, 3), (12, 20)])
    def test_equals_loops(self, rows, classes, soft) -> None:
        jvp, probs, target = make_batch(rows, classes, seed=rows)
        if soft:
            target = mix_targets(target, classes)
        solution = solve(jvp, probs, target)
        labels = dense_target(target, classes, torch.float64)
        keep = torch.sigmoid((labels * solution.inner_products).sum(-1))
        expected = looped_balance(keep.tolist(), labels.tolist())
        assert solution.weights.tolist() == pytest.approx(expected, rel=1e-12)

    def test_counts_augmented_rows_only(self) -> None:
        jvp, probs, target = make_batch(9, 3, seed=1)
        augmented = torch.arange(9) % 3 != 0
        solution = solve(jvp, probs, target, augmented)
        labels = F.one_hot(target, 3).double()[augmented]
        keep = torch.sigmoid((labels * solution.inner_products[augmented]).sum(-1))
        expected = looped_balance(keep.tolist(), labels.tolist())
        assert solution.weights[augmented].tolist() == pytest.approx(expected, rel=1e-12)

    def test_no_class_is_lifted_more_than_five_times(self) -> None:
        # class 0: three rows at 0.9; class 1: 37 rows at 0.001, whose factor would be 133
        keep = torch.tensor([0.9] * 3 + [0.001] * 37, dtype=torch.float64)
        labels = F.one_hot((torch.arange(40) >= 3).long(), 2).double()
        weights = learned_weights(
            torch.logit(keep).unsqueeze(-1) * labels,
            labels,
            labels,
            torch.ones(40, dtype=torch.bool),
            Settings(weight_rule="sigmoid"),
        )
        expected = looped_balance(keep.tolist(), labels.tolist())
        assert weights.tolist() == pytest.approx(expected, rel=1e-12)
        mean = keep.mean().item()
        first = 7 / (2.7 + 4 * mean)
        assert (weights[3] / weights[0]).item() == pytest.approx(5 * 0.001 / (first * 0.9))

    def test_class_shares_move_towards_their_rows(self) -> None:
        # a class whose rows look harmful keeps most of its share
        keep = torch.tensor([0.2] * 20 + [0.8] * 20, dtype=torch.float64)
        labels = F.one_hot(torch.arange(40) // 20, 2).double()
        arguments = (
            torch.logit(keep).unsqueeze(-1) * labels,
            labels,
            labels,
            torch.ones(40, dtype=torch.bool),
        )
        plain = learned_weights(*arguments, Settings(weight_rule="sigmoid"), balance_classes=False)
        balanced = learned_weights(*arguments, Settings(weight_rule="sigmoid"))
        assert plain[:20].sum().item() == pytest.approx(8.0)
        # c = 24 / (4 + 2) and 24 / (16 + 2)
        assert balanced[:20].sum().item() == pytest.approx(40 * 0.8 / (0.8 + 16 / 15))


class TestUnionBatches:
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("weight_rule", ["sigmoid", "expected", "sum", "positive", "ones"])
    def test_clean_rows_keep_weight_1_and_their_own_label(self, weight_rule, soft) -> None:
        jvp, probs, target = make_batch(8, 3)
        if soft:
            target = mix_targets(target, 3)
        augmented = torch.arange(8) >= 4
        solution = solve(
            jvp,
            probs,
            target,
            augmented,
            label_rule="softmax",
            label_penalty=0.0,
            gumbel=True,
            weight_rule=weight_rule,
            generator=torch.Generator().manual_seed(0),
        )
        own = dense_target(target, 3, torch.float64)
        assert torch.equal(solution.weights[:4], torch.ones(4).double())
        assert torch.equal(solution.soft_labels[:4], own[:4])
        assert solution.weights[4:].sum().item() == pytest.approx(4.0)
        assert not torch.isclose(solution.soft_labels[4:], own[4:]).all(-1).any()

    def test_clean_rows_are_not_read(self) -> None:
        jvp, probs, target = make_batch(8, 3)
        augmented = torch.arange(8) >= 4
        expected = solve(jvp[4:], probs[4:], target[4:])
        jvp[:4] = torch.nan
        solution = solve(jvp, probs, target, augmented)
        assert not solution.failed
        torch.testing.assert_close(solution.weights[4:], expected.weights)
        torch.testing.assert_close(solution.soft_labels[4:], expected.soft_labels)

    def test_no_augmented_row(self) -> None:
        jvp, probs, target = make_batch(4, 3)
        solution = solve(jvp, probs, target, torch.zeros(4, dtype=torch.bool))
        assert torch.equal(solution.weights, torch.ones(4).double())
        assert torch.equal(solution.soft_labels, F.one_hot(target, 3).double())
        assert solution.inner_product_rms == 0
        assert not solution.failed


class TestLossOptions:
    """Pi must be that of the loss which is minimised, class weights and smoothing included."""

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
    @pytest.mark.parametrize("class_weight", [None, [0.5, 2.0, 1.0, 4.0]])
    def test_products_equal_the_gradient_of_the_actual_loss(
        self, class_weight, label_smoothing
    ) -> None:
        weight = None if class_weight is None else torch.tensor(class_weight).double()
        options = {"weight": weight, "label_smoothing": label_smoothing}
        for seed in range(5):
            problem = make_problem(seed)
            val_gradient = dense_val_gradient(
                problem.model, problem.val_inputs, problem.val_target, **options
            )
            scores = problem.model(problem.inputs)
            solution = plain_solve(
                dense_jacobian(problem.model, problem.inputs) @ -val_gradient,
                scores.softmax(-1),
                problem.target,
                class_weight=weight,
                label_smoothing=label_smoothing,
            )
            for row in range(4):
                for label in range(4):
                    # of one row labelled so; `sum`, since `mean` divides by the class weight
                    loss = F.cross_entropy(
                        scores[row : row + 1], torch.tensor([label]), reduction="sum", **options
                    )
                    gradient = torch.autograd.grad(loss, problem.params, retain_graph=True)
                    flat = torch.cat([part.reshape(-1) for part in gradient])
                    # A descent step moves along -grad(loss) = grad(log p), hence no minus here.
                    expected = (flat * val_gradient).sum().item()
                    found = solution.inner_products[row, label].item()
                    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_by_hand(self) -> None:
        products = torch.tensor([[1.0, -2.0]])
        weight = torch.tensor([3.0, 0.5])
        assert loss_inner_products(products, weight, 0.0).tolist() == [[3.0, -1.0]]
        # 0.8 * (3, -1) + 0.2 * mean(3, -1)
        found = loss_inner_products(products, weight, 0.2)
        assert found[0].tolist() == pytest.approx([2.6, -0.6])
        assert loss_inner_products(products, None, 0.0).tolist() == products.tolist()


class TestReference:
    @pytest.mark.parametrize("score_space", ["log_probs", "probs", "logits"])
    def test_inner_products_equal_the_dense_jacobian(self, score_space) -> None:
        for seed in range(4):
            problem = make_problem(seed)
            gradient = torch.autograd.grad(problem.val_loss(), problem.params)
            found = inner_products_reference(
                problem.model(problem.inputs), problem.params, gradient, score_space
            )
            flat = torch.cat([part.reshape(-1) for part in gradient])
            expected = dense_jacobian(problem.model, problem.inputs, score_space) @ -flat
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            assert not found.requires_grad

    @pytest.mark.parametrize("score_space", ["log_probs", "probs", "logits"])
    def test_solve_finds_the_reference_from_the_scores_tangent(self, score_space) -> None:
        problem = make_problem(11)
        gradient = torch.autograd.grad(problem.val_loss(), problem.params)
        scores = problem.model(problem.inputs)
        flat = torch.cat([part.reshape(-1) for part in gradient])
        solution = plain_solve(
            dense_jacobian(problem.model, problem.inputs) @ -flat,
            scores.softmax(-1),
            problem.target,
            score_space=score_space,
        )
        expected = inner_products_reference(scores, problem.params, gradient, score_space)
        torch.testing.assert_close(solution.inner_products, expected, rtol=1e-10, atol=1e-12)

    def test_parameters_that_scores_do_not_use_add_nothing(self) -> None:
        problem = make_problem(0)
        gradient = torch.autograd.grad(problem.val_loss(), problem.params)
        scores = problem.model(problem.inputs)
        unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(
            inner_products_reference(
                scores, [*problem.params, unused], [*gradient, torch.ones(3).double()]
            ),
            inner_products_reference(scores, problem.params, gradient),
            rtol=0,
            atol=0,
        )


def solve_in_parts(sizes, jvp, probs, target, augmented, **options) -> list:
    """Solve parts of a batch in threads that add their sums in lock-step, as ranks do."""
    return in_parts(
        sizes,
        lambda rows, ranks: solve(
            jvp[rows], probs[rows], target[rows], augmented[rows], ranks=ranks, **options
        ),
    )


class TestSharedBatches:
    @pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [1, 2, 5, 4]], ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"normalize": False, "weight_rule": "expected", "label_penalty": 0.0},
            {"weight_rule": "sum", "score_space": "logits", "label_rule": "argmax"},
            {"weight_rule": "ones", "score_space": "probs"},
            {"balance_classes": False, "label_smoothing": 0.1},
        ],
        ids=str,
    )
    def test_parts_equal_the_whole(self, sizes, options) -> None:
        jvp, probs, target = make_batch(12, 4)
        target = mix_targets(target, 4)
        # the first part of the last split holds no augmented row
        augmented = torch.tensor([0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
        whole = solve(jvp, probs, target, augmented, **options)
        parts = solve_in_parts(sizes, jvp, probs, target, augmented, **options)
        for name in ("weights", "soft_labels", "inner_products"):
            found = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(found, getattr(whole, name), rtol=1e-12, atol=1e-13)
        for part in parts:
            torch.testing.assert_close(part.inner_product_rms, whole.inner_product_rms)
        assert whole.weights[augmented].std() > 0 or options.get("weight_rule") == "ones"

    def test_one_part_without_kept_rows(self) -> None:
        jvp, probs, target = make_batch(8, 3)
        jvp[:4] = torch.tensor([-5.0, 1.0, 2.0]).double()
        target[:4] = 0
        options = {"normalize": False, "weight_rule": "expected", "label_rule": "keep"}
        every = torch.ones(8, dtype=torch.bool)
        first, second = solve_in_parts([4, 4], jvp, probs, target, every, **options)
        assert torch.equal(first.weights, torch.zeros(4).double())
        assert second.weights.sum().item() == pytest.approx(8.0)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_a_non_finite_part_stops_every_part(self, normalize) -> None:
        jvp, probs, target = make_batch(8, 3)
        jvp[6, 1] = torch.nan
        every = torch.ones(8, dtype=torch.bool)
        for part in solve_in_parts([4, 4], jvp, probs, target, every, normalize=normalize):
            assert part.failed
            assert torch.equal(part.weights, torch.ones(4).double())
            assert torch.equal(part.soft_labels.sum(-1), torch.ones(4).double())
            assert part.soft_labels.max() == 1


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_inputs_are_computed_in_float32(self, dtype) -> None:
        jvp, probs, target = make_batch(6, 4)
        jvp, probs = (300 * jvp).to(dtype), probs.to(dtype)  # squares overflow float16
        solution = solve(jvp, probs, target)
        expected = solve(jvp.float(), probs.float(), target)
        assert not solution.failed
        for name in ("weights", "soft_labels", "inner_products", "inner_product_rms"):
            found = getattr(solution, name)
            assert found.dtype == torch.float32
            assert torch.equal(found, getattr(expected, name))

    def test_float64_stays_float64(self) -> None:
        solution = solve(*make_batch(6, 4))
        assert solution.weights.dtype == solution.soft_labels.dtype == torch.float64

    @pytest.mark.parametrize("weight_rule", ["sigmoid", "expected", "positive"])
    def test_autocast_rounds_nothing(self, weight_rule) -> None:
        jvp, probs, target = (part.float() for part in make_batch(32, 5))
        expected = solve(jvp, probs, target.long(), weight_rule=weight_rule)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = solve(jvp, probs, target.long(), weight_rule=weight_rule)
        for name in ("weights", "soft_labels", "inner_products"):
            assert torch.equal(getattr(solution, name), getattr(expected, name))

    def test_result_is_detached(self) -> None:
        jvp, probs, target = make_batch(6, 4)
        solution = solve(jvp.requires_grad_(), probs.requires_grad_(), target)
        assert not solution.weights.requires_grad
        assert not solution.soft_labels.requires_grad


def test_rounding_left_by_centring_is_not_blown_up():
    jvp = torch.tensor([[0.1, 0.37, -0.213]]).repeat(5, 1)  # equal rows: nothing to tell apart
    solution = solve(jvp, torch.full((5, 3), 1 / 3), torch.arange(5) % 3)
    assert solution.inner_products.abs().max() < 0.2
    torch.testing.assert_close(solution.weights, torch.ones(5), rtol=0.05, atol=0)
