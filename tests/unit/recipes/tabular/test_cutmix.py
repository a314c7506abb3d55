"""Tabular CutMix in both definitions, against loops over cells."""

import pytest
import torch
import torch.nn.functional as F

from saflex_lightning.recipes.tabular.cutmix import draw_ratio, mix_columns, replace_cells
from saflex_lightning.recipes.tabular.table import TabularInputs

ROWS, NUMERIC, CATEGORICAL = 400, 7, 3
COLUMNS = NUMERIC + CATEGORICAL


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_rows(seed=0):
    """All numbers of a column differ; levels often agree."""
    numbers = torch.randn(ROWS, NUMERIC, generator=generator(seed))
    levels = torch.randint(3, (ROWS, CATEGORICAL), generator=generator(seed))
    return TabularInputs(numbers, levels), torch.randint(4, (ROWS,), generator=generator(seed))


def joined(inputs):
    return torch.cat([inputs.numeric.double(), inputs.categorical.double()], dim=1)


def partners(clean, mixed):
    """The other row of every row, from its numbers, which are unique; None where none came."""
    where = {value: row for row, cells in enumerate(clean.numeric.tolist()) for value in cells}
    found = []
    for row, cells in enumerate(mixed.numeric.tolist()):
        others = {where[value] for value in cells} - {row}
        assert len(others) <= 1, "cells of one row came from two others"
        found.append(others.pop() if others else None)
    return found


def mix(kind, probability=0.3, seed=0, rows=None):
    inputs, target = rows or make_rows()
    if kind == "cells":
        return replace_cells(inputs, target, probability=probability, generator=generator(seed))
    return mix_columns(
        inputs, target, num_classes=4, ratio=1 - probability, generator=generator(seed)
    )


@pytest.mark.parametrize("kind", ["cells", "columns"])
class TestBoth:
    def test_cells_keep_their_column_and_come_from_one_other_row(self, kind):
        clean, _ = make_rows()
        mixed = mix(kind)
        others = partners(clean, mixed.inputs)
        before, after = joined(clean).tolist(), joined(mixed.inputs).tolist()
        for row, other in enumerate(others):
            if other is None:
                continue
            for column in range(COLUMNS):
                assert after[row][column] in {before[row][column], before[other][column]}
        known = [other for other in others if other is not None]
        assert len(known) > 0.8 * ROWS
        assert len(set(known)) == len(known)  # a permutation

    def test_changed_is_the_share_of_cells_that_differ(self, kind):
        clean, _ = make_rows()
        mixed = mix(kind)
        expected = (joined(clean) != joined(mixed.inputs)).float().mean(1)
        torch.testing.assert_close(mixed.changed, expected)

    def test_generator_decides_alone(self, kind):
        one, other = mix(kind, seed=1), mix(kind, seed=2)
        torch.manual_seed(99)
        again = mix(kind, seed=1)
        assert joined(one.inputs).equal(joined(again.inputs))
        assert not joined(one.inputs).equal(joined(other.inputs))

    def test_clean_rows_are_left_alone(self, kind):
        rows, copy = make_rows(), make_rows()
        mix(kind, rows=rows)
        assert joined(rows[0]).equal(joined(copy[0]))

    @pytest.mark.parametrize("columns", ["numeric", "categorical"])
    def test_one_kind_of_columns_is_enough(self, kind, columns):
        inputs, target = make_rows()
        other = "categorical" if columns == "numeric" else "numeric"
        inputs = inputs._replace(**{other: getattr(inputs, other)[:, :0]})
        mixed = mix(kind, rows=(inputs, target))
        assert getattr(mixed.inputs, other).shape == (ROWS, 0)
        assert 0.0 < mixed.changed.mean() < 0.5

    def test_one_row_has_no_other(self, kind):
        inputs, target = make_rows()
        one = (TabularInputs(*(part[:1] for part in inputs)), target[:1])
        assert mix(kind, rows=one).changed.item() == 0.0


class TestReplaceCells:
    def test_label_stays_and_cells_change_with_their_probability(self):
        clean, target = make_rows()
        mixed = mix("cells", probability=0.1)
        assert mixed.target.equal(target)
        share = (clean.numeric != mixed.inputs.numeric).float().mean().item()
        assert share == pytest.approx(0.1, abs=0.02)  # 3 standard errors of 2,800 draws

    def test_certain_replacement_permutes_the_rows(self):
        clean, _ = make_rows()
        mixed = mix("cells", probability=1.0)
        assert joined(mixed.inputs).sort(0).values.equal(joined(clean).sort(0).values)


class TestMixColumns:
    @pytest.mark.parametrize(("ratio", "kept"), [(0.0, 0), (0.35, 3), (0.99, 9), (1.0, 10)])
    def test_as_many_columns_stay_as_the_ratio_says(self, ratio, kept):
        numbers = torch.arange(ROWS * COLUMNS).float().view(ROWS, COLUMNS)
        inputs = TabularInputs(numbers, torch.zeros(ROWS, 0, dtype=torch.int64))
        mixed = mix("columns", 1 - ratio, rows=(inputs, torch.zeros(ROWS, dtype=torch.int64)))
        others = partners(inputs, mixed.inputs)
        stayed = (mixed.inputs.numeric == numbers).sum(1)
        assert all(
            count == (COLUMNS if other is None else kept)
            for count, other in zip(stayed.tolist(), others, strict=True)
        )

    def test_label_is_mixed_by_the_share_of_equal_cells(self):
        clean, target = make_rows()
        mixed = mix("columns", 0.4)
        others = partners(clean, mixed.inputs)
        before, after = joined(clean), joined(mixed.inputs)
        torch.testing.assert_close(mixed.target.sum(1), torch.ones(ROWS))
        agreed = 0
        for row, other in enumerate(others):
            if other is None:
                continue
            equal = sum(bool(before[row, c] == after[row, c]) for c in range(COLUMNS)) / COLUMNS
            agreed += equal > 0.6 + 1e-6  # cells of both rows that agree count as equal
            own = F.one_hot(target[row], 4)
            expected = equal * own + (1 - equal) * F.one_hot(target[other], 4)
            torch.testing.assert_close(mixed.target[row], expected.float())
        assert agreed > 100


class TestRatio:
    def draws(self, alpha, probability, count=2000):
        source = generator(3)
        return torch.tensor(
            [
                draw_ratio(alpha=alpha, probability=probability, generator=source)
                for _ in range(count)
            ]
        )

    @pytest.mark.parametrize("alpha", [0.1, 1.0, 2.0])
    def test_moments_of_the_beta_distribution(self, alpha):
        draws = self.draws(alpha, 1.0)
        assert draws.mean().item() == pytest.approx(0.5, abs=0.04)
        assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.02)

    def test_batches_are_left_alone_with_their_probability(self):
        assert (self.draws(1.0, 0.5) == 1.0).float().mean().item() == pytest.approx(0.5, abs=0.04)
        assert self.draws(1.0, 0.0, 20).eq(1.0).all()
