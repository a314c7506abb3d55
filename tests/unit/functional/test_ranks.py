"""What processes share, with threads in their place."""

import torch
from helpers.solving import Threads

from saflex_lightning.functional.ranks import Ranks

ROWS = torch.arange(12.0).view(6, 2)


def test_one_process_shares_nothing() -> None:
    alone = Ranks()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.sum(ROWS) is ROWS
    assert alone.mean([ROWS])[0] is ROWS
    assert alone.most_rows(ROWS) == 6
    assert torch.equal(alone.gather(ROWS, 6), ROWS)


def test_without_a_process_group_there_is_one_process() -> None:
    current = Ranks.current()
    assert (current.rank, current.size) == (0, 1)


def test_means_keep_the_shape_and_the_dtype_of_each_tensor() -> None:
    def work(ranks: Ranks) -> list:
        return list(ranks.mean([(ranks.rank + 1) * ROWS, torch.tensor(ranks.rank).double()]))

    for matrix, number in Threads(3).run(work):
        torch.testing.assert_close(matrix, 2 * ROWS)
        torch.testing.assert_close(number, torch.tensor(1.0, dtype=torch.float64))


def test_rows_of_all_ranks_lie_in_blocks_and_missing_ones_are_0() -> None:
    sizes = (2, 0, 4)

    def work(ranks: Ranks) -> tuple:
        rows = ROWS[: sizes[ranks.rank]] + 1
        most = ranks.most_rows(rows)
        return most, ranks.gather(rows, most), ranks.gather(rows, 3)

    expected = [*(ROWS[:2] + 1).tolist(), *6 * [[0, 0]], *(ROWS[:4] + 1).tolist()]
    for most, whole, cut in Threads(3).run(work):
        assert most == 4
        assert whole.tolist() == expected
        assert cut.tolist() == [*expected[:3], *expected[4:7], *expected[8:11]]  # room for three
