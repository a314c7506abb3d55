"""Averages of rows over their visits, against plain sums."""

from copy import deepcopy

import pytest
import torch
from helpers.solving import ALONE, in_parts

from saflex_lightning.evidence import averages as averages_module
from saflex_lightning.evidence.averages import RowAverages

KEYS = torch.tensor([-(2**63), -7, 0, 3, 4, 10**6, 2**40, 2**62, 2**63 - 1])


def update(averages, index, values, ignored=None, ranks=ALONE, worth=1.0):
    index, values = torch.as_tensor(index), torch.as_tensor(values)
    ignored = torch.zeros(len(values), dtype=torch.bool) if ignored is None else ignored
    found = averages.update(index, values, torch.as_tensor(ignored), ranks, worth)
    averages.take_in()
    return found


def mean(visits):
    """The mean of a row's values, each counting by its worth."""
    return sum(worth * value for worth, value in visits) / sum(worth for worth, _ in visits)


class TestAverages:
    def test_averages_equal_plain_sums_of_visits_by_their_worth(self):
        generator = torch.Generator().manual_seed(0)
        averages, seen = RowAverages(), {}
        for worth in (0.1, 2.0, 1e-6, 0.7, 0.3):
            index = KEYS[torch.randperm(8, generator=generator)[:4]]
            values = torch.rand(4, generator=generator)
            for key, value in zip(index.tolist(), values.tolist(), strict=True):
                seen.setdefault(key, []).append((worth, value))
            found = update(averages, index, values, worth=worth)
            expected = [mean(seen[key]) for key in index.tolist()]
            assert found.tolist() == pytest.approx(expected)
        index, evidence = averages.read()
        assert index.tolist() == sorted(seen)
        assert evidence.tolist() == pytest.approx([mean(seen[key]) for key in sorted(seen)])

    def test_a_row_may_stand_in_a_batch_twice(self):
        """Both count from the next batch on."""
        averages = RowAverages()
        assert update(averages, [5, 5, 2], [0.2, 0.4, 0.9]).tolist() == pytest.approx(
            [0.2, 0.4, 0.9]
        )
        index, evidence = averages.read()
        assert index.tolist() == [2, 5]
        assert evidence.tolist() == pytest.approx([0.9, 0.3])
        assert update(averages, [5], [0.9]).item() == pytest.approx(0.5)

    def test_a_row_that_comes_again_is_found_before_it_is_taken_in(self):
        averages = RowAverages()
        for values, expected in (([0.2, 0.5], [0.2, 0.5]), ([0.6, 0.1], [0.4, 0.3])):
            none = torch.zeros(2, dtype=torch.bool)
            found = averages.update(torch.tensor([7, 3]), torch.tensor(values), none, ALONE, 1.0)
            assert found.tolist() == pytest.approx(expected)

    def test_what_waits_is_read_saved_and_taken_in_together(self, monkeypatch):
        """As on a device that would be waited for."""
        monkeypatch.setattr(averages_module, "looking_is_free", lambda device: False)
        generator = torch.Generator().manual_seed(0)
        at_once, waiting = RowAverages(), RowAverages()
        none = torch.zeros(5, dtype=torch.bool)
        for _ in range(3):  # rows that were seen before they wait
            index = KEYS[torch.randint(len(KEYS), (5,), generator=generator)]
            values = torch.rand(5, generator=generator)
            for one in (at_once, waiting):
                update(one, index, values)
                one.take_in()
        parts = [
            (
                KEYS[torch.randint(len(KEYS), (5,), generator=generator)],
                torch.rand(5, generator=generator),
            )
            for _ in range(6)
        ]
        for index, values in parts:
            waiting.update(index, values, none, ALONE, 1.0)
        index, values = map(torch.cat, zip(*parts, strict=True))
        at_once.update(index, values, none.repeat(6), ALONE, 1.0)
        at_once.take_in()
        copy = RowAverages()
        copy.load_state_dict(waiting.state_dict())
        before = deepcopy(waiting.state_dict())
        for one in (waiting, copy):
            for found, expected in zip(one.read(), at_once.read(), strict=True):
                torch.testing.assert_close(found, expected)
        after = waiting.state_dict()
        assert len(before["waiting"]) == len(after["waiting"]) == 6, "reading takes nothing in"
        copy.take_in()
        assert copy.state_dict()["waiting"] is None
        torch.testing.assert_close(copy.state_dict()["sums"], at_once.state_dict()["sums"])

    def test_rows_that_are_ignored_count_in_their_step_alone(self):
        averages = RowAverages()
        assert update(averages, [8], [0.3], [True]).tolist() == pytest.approx([0.3])
        assert averages.read().index.tolist() == []
        update(averages, [0, 1], [0.5, 0.5])
        ignored = [True, True, False, True]
        found = update(averages, [-1, 1, 2, 0], [0.1, torch.nan, 0.9, 0.7], ignored).tolist()
        assert found == pytest.approx([0.1, torch.nan, 0.9, 0.6], nan_ok=True)
        index, evidence = averages.read()
        assert index.tolist() == [0, 1, 2]
        assert evidence.tolist() == pytest.approx([0.5, 0.5, 0.9])

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
        assert all(torch.equal(state[name], before[name]) for name in ("index", "sums"))

    def test_ranks_share_the_averages_of_the_whole_batch(self):
        index, values = KEYS[[8, 0, 3, 3, 5]], torch.rand(5)
        ignored = torch.tensor([False, False, False, False, True])
        whole = RowAverages()
        expected = update(whole, index, values, ignored)

        def work(own, ranks):
            averages = RowAverages()
            return update(averages, index[own], values[own], ignored[own], ranks), averages.read()

        parts = in_parts([4, 1], work)
        torch.testing.assert_close(torch.cat([found for found, _ in parts]), expected)
        for _, (rows, evidence) in parts:
            assert torch.equal(rows, whole.read().index)
            torch.testing.assert_close(evidence, whole.read().evidence)
