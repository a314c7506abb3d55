"""What is remembered of the last layer, against plain loops in double precision."""

from copy import deepcopy

import pytest
import torch
from helpers.solving import ALONE, in_parts

from saflex_lightning.evidence.memory import RunningMoments, ValidationMemory


class TestMoments:
    def test_averages_equal_plain_loops(self):
        generator = torch.Generator().manual_seed(0)
        moments, mean, covariance = RunningMoments(), None, None
        for _ in range(3):
            rows = torch.randn(6, 3, generator=generator, dtype=torch.float64)
            usable = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
            found = moments.update(rows, usable, ALONE)
            kept = rows[usable > 0]
            own = kept.mean(0)
            spread = sum(torch.outer(row - own, row - own) for row in kept) / len(kept)
            mean = own if mean is None else 0.95 * mean + 0.05 * own
            covariance = spread if covariance is None else 0.95 * covariance + 0.05 * spread
        torch.testing.assert_close(found, (mean, covariance))

    def test_a_batch_without_usable_rows_changes_nothing(self):
        moments = RunningMoments()
        before = moments.update(torch.randn(4, 2), torch.ones(4), ALONE)
        after = moments.update(torch.randn(4, 2), torch.zeros(4), ALONE)
        assert all(map(torch.equal, after, before))

    def test_the_first_batch_with_usable_rows_starts_the_averages(self):
        rows = torch.randn(4, 2)
        late, first = RunningMoments(), RunningMoments()
        assert all(part.eq(0).all() for part in late.update(rows, torch.zeros(4), ALONE))
        found, expected = (one.update(rows, torch.ones(4), ALONE) for one in (late, first))
        assert all(map(torch.equal, found, expected))

    def test_ranks_share_the_moments_of_the_whole_batch(self):
        rows, usable = torch.randn(6, 3).double(), torch.tensor([1.0, 1, 0, 1, 1, 1]).double()
        expected = RunningMoments().update(rows, usable, ALONE)
        for found in in_parts(
            [4, 2], lambda own, ranks: RunningMoments().update(rows[own], usable[own], ranks)
        ):
            torch.testing.assert_close(found, expected)

    def test_restored_moments_go_on_alike(self):
        first, copy = RunningMoments(), RunningMoments()
        first.update(torch.randn(4, 2), torch.ones(4), ALONE)
        copy.load_state_dict(deepcopy(first.state_dict()))
        rows = torch.randn(4, 2)
        found = [one.update(rows, torch.ones(4), ALONE) for one in (first, copy)]
        assert all(map(torch.equal, *found))


def make_memory(num_rows):
    memory = ValidationMemory()
    memory.start(num_rows, torch.device("cpu"))
    return memory


class TestMemory:
    def rows(self, first, size):
        numbers = torch.arange(first, first + size, dtype=torch.float64)
        features = torch.stack([numbers, -numbers], 1)
        labels = torch.eye(3).double()[numbers.long() % 3]
        return features, numbers.unsqueeze(1).expand(-1, 3), labels

    def test_the_newest_rows_of_one_pass_are_kept(self):
        memory = make_memory(10)
        for first in range(0, 24, 4):
            memory.add(*self.rows(first, 4), ALONE)
            features, residuals, labels, present = memory.read()
            newest = torch.arange(max(0, first + 4 - 10), first + 4)
            assert sorted(features[:, 0].tolist()) == newest.tolist()
            assert residuals[:, 1].equal(features[:, 0])
            assert labels.argmax(1).equal(features[:, 0].long() % 3)
            assert present.eq(1).all()

    def test_rows_with_a_non_finite_number_are_absent(self):
        features, residuals, labels = self.rows(1, 4)
        features[1, 0], residuals = torch.nan, residuals.clone()
        residuals[2, 1] = torch.inf
        memory = make_memory(10)
        memory.add(features, residuals, labels, ALONE)
        features, residuals, _, present = memory.read()
        assert present.tolist() == [1, 0, 0, 1]
        assert features[1:3].eq(0).all()
        assert residuals[1:3].eq(0).all()

    def test_smaller_batches_leave_places_that_are_absent(self):
        memory = make_memory(12)
        for size in (4, 2, 4):
            memory.add(*self.rows(0, size), ALONE)
        assert memory.read()[-1].sum() == 10

    def test_a_restored_memory_goes_on_alike(self):
        memory, copy = make_memory(6), make_memory(6)
        memory.add(*self.rows(0, 4), ALONE)
        copy.load_state_dict(deepcopy(memory.state_dict()))
        for one in (memory, copy):
            one.add(*self.rows(4, 4), ALONE)
        assert all(map(torch.equal, memory.read(), copy.read()))

    def test_reading_an_empty_memory(self):
        with pytest.raises(RuntimeError, match="Expected `add` to be called before `read`"):
            make_memory(3).read()

    def test_a_cleared_memory_starts_anew(self):
        memory = make_memory(6)
        memory.add(*self.rows(0, 4), ALONE)
        memory.clear()
        memory.add(*self.rows(8, 2), ALONE)
        assert memory.read()[0][:, 0].tolist() == [8, 9, 0, 0]  # room for as many rows as before
        assert memory.read()[-1].tolist() == [1, 1, 0, 0]

    def test_rows_that_cannot_be_counted_have_room_for_some_thousands(self):
        memory = make_memory(None)
        for first in range(0, 9000, 1000):
            memory.add(*self.rows(first, 1000), ALONE)
        assert sorted(memory.read()[0][:, 0].tolist()) == list(range(9000 - 8192, 9000))

    def test_ranks_remember_the_rows_of_all(self):
        whole = self.rows(1, 4)

        def work(own, ranks):
            memory = make_memory(10)
            memory.add(*(part[own] for part in whole), ranks)
            return memory.read()

        for *parts, present in in_parts([3, 1], work):
            assert present.tolist() == [1, 1, 1, 1, 0, 0]
            assert all(map(torch.equal, (part[:4] for part in parts), whole))
