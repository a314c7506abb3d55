"""Duplicates, splits and preprocessing."""

import numpy as np
import pytest
import torch
from helpers.tables import make_table

from saflex_lightning.recipes.tabular.preprocessing import Preprocessing
from saflex_lightning.recipes.tabular.sets import read_table
from saflex_lightning.recipes.tabular.table import drop_duplicates, split_rows


class TestDuplicates:
    def test_first_copies_stay_in_order(self):
        table = make_table(6)
        table.numeric[4] = np.nan
        found = drop_duplicates(table.take(np.array([3, 4, 0, 3, 4, 4, 5])))
        np.testing.assert_array_equal(found.numeric, table.numeric[[3, 4, 0, 5]])

    def test_rows_that_differ_in_one_thing_only_stay(self):
        table = make_table(6).take(np.zeros(4, int))
        table.numeric[1, 0] += 1.0
        table.categorical[2, 1] += 1
        table.target[3] = 1 - table.target[3]
        assert len(drop_duplicates(table).target) == 4

    def test_minus_zero_is_zero(self):
        table = make_table(6).take(np.zeros(2, int))
        table.numeric[:, 0] = [0.0, -0.0]
        assert len(drop_duplicates(table).target) == 1

    def test_qsar_has_three(self):
        assert drop_duplicates(read_table("qsar")).class_counts == (698, 354)


class TestSplit:
    @pytest.mark.parametrize("stratified", [False, True])
    def test_parts_are_disjoint_and_have_their_shares(self, stratified):
        table = make_table(200)
        parts = split_rows(table, seed=1, stratified=stratified)
        assert [len(part.target) for part in parts] == pytest.approx([130, 30, 40], abs=1)
        rows = np.concatenate([part.numeric[:, 0] for part in parts])
        assert sorted(rows) == sorted(table.numeric[:, 0])

    def test_seed_decides(self):
        one, same, other = (
            split_rows(make_table(), seed=seed, stratified=False)[0].numeric for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)

    def test_stratified_parts_have_their_share_of_few_positives(self):
        parts = split_rows(make_table(2000, positives=20), seed=0, stratified=True)
        assert [int(part.target.sum()) for part in parts] == [13, 3, 4]

    @pytest.mark.parametrize(
        ("stratified", "advice"), [(False, "`stratified`=True"), (True, "give it more rows")]
    )
    def test_a_class_that_misses_in_a_part_is_an_error(self, stratified, advice):
        table = make_table(2000, positives=2)
        with pytest.raises(ValueError, match=rf"of class 'yes' \(2 rows in all\).*{advice}"):
            split_rows(table, seed=0, stratified=stratified)

    def test_one_class_is_an_error(self):
        table = make_table()._replace(classes=("yes",))
        with pytest.raises(ValueError, match=r"two classes or more, but got \['yes'\]"):
            split_rows(table, seed=0, stratified=False)


class TestPreprocessing:
    def test_numbers_against_a_plain_computation(self):
        table = make_table(50)
        table.numeric[::7, 1] = np.nan
        train, rest = table.take(np.arange(30)), table.take(np.arange(30, 50))
        prepare = Preprocessing(train)
        for rows in (train, rest):
            found = prepare.transform(rows).numeric
            for column in range(2):
                seen = [x for x in train.numeric[:, column] if x == x]
                mean = sum(seen) / len(seen)
                filled = [x if x == x else mean for x in train.numeric[:, column]]
                deviation = (sum((x - mean) ** 2 for x in filled) / len(filled)) ** 0.5
                cells = rows.numeric[:, column]
                expected = [((x if x == x else mean) - mean) / deviation for x in cells]
                torch.testing.assert_close(found[:, column], torch.tensor(expected).float())

    @pytest.mark.parametrize("missing_in_train", [False, True])
    def test_missing_and_unseen_levels_have_codes_of_their_own(self, missing_in_train):
        table = make_table(8)
        table.categorical[:, 0] = [2, 0, 2, -1 if missing_in_train else 0, 0, 1, 2, -1]
        train, rest = table.take(np.arange(4)), table.take(np.arange(4, 8))
        prepare = Preprocessing(train)
        missing = 0 if missing_in_train else 2
        assert prepare.transform(train).categorical[:, 0].tolist() == [3, 2, 3, missing]
        assert prepare.transform(rest).categorical[:, 0].tolist() == [2, 1, 3, 0]
        assert table.cardinalities == [5, 4]

    def test_constant_and_empty_columns_become_zero(self):
        table = make_table(10)
        table.numeric[:, 0] = 3.0
        table.numeric[:, 1] = np.nan
        assert Preprocessing(table).transform(table).numeric.eq(0).all()

    def test_test_rows_do_not_change_the_training_rows(self):
        table = make_table(40)
        train = table.take(np.arange(20))
        before = Preprocessing(train).transform(train)
        table.numeric[20:] = 1e6
        assert Preprocessing(train).transform(train).numeric.equal(before.numeric)
        mean = before.numeric.mean(0)
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-6, rtol=0.0)
