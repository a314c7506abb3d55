"""Which validation rows are remembered, against plain loops."""

from copy import deepcopy

import pytest
import torch
from helpers.solving import ALONE, in_parts

from saflex_lightning.evidence.memory import ValidationMemory


def make_memory(num_rows):
    memory = ValidationMemory()
    memory.start(num_rows, torch.device("cpu"))
    return memory


class TestMemory:
    def rows(self, first, size):
        numbers = torch.arange(first, first + size, dtype=torch.float64)
        scores = torch.stack([numbers, -numbers, numbers], 1)
        labels = torch.eye(3).double()[numbers.long() % 3]
        return scores, numbers.unsqueeze(1).expand(-1, 3), labels

    def test_the_newest_rows_of_one_pass_are_kept(self):
        memory = make_memory(10)
        for first in range(0, 24, 4):
            memory.add(*self.rows(first, 4), ALONE)
            scores, residuals, labels, present = memory.read()
            newest = torch.arange(max(0, first + 4 - 10), first + 4)
            assert sorted(scores[:, 0].tolist()) == newest.tolist()
            assert residuals[:, 1].equal(scores[:, 0])
            assert labels.argmax(1).equal(scores[:, 0].long() % 3)
            assert present.eq(1).all()

    def test_rows_with_a_non_finite_number_are_absent(self):
        scores, residuals, labels = self.rows(1, 4)
        scores[1, 0], residuals = torch.nan, residuals.clone()
        residuals[2, 1] = torch.inf
        memory = make_memory(10)
        memory.add(scores, residuals, labels, ALONE)
        scores, residuals, _, present = memory.read()
        assert present.tolist() == [1, 0, 0, 1]
        assert scores[1:3].eq(0).all()
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
        assert sorted(memory.read()[0][:, 0].tolist()) == list(range(9000 - 2048, 9000))

    def test_ranks_remember_the_rows_of_all(self):
        whole = self.rows(1, 4)

        def work(own, ranks):
            memory = make_memory(10)
            memory.add(*(part[own] for part in whole), ranks)
            return memory.read()

        for *parts, present in in_parts([3, 1], work):
            assert present.tolist() == [1, 1, 1, 1, 0, 0]
            assert all(map(torch.equal, (part[:4] for part in parts), whole))
