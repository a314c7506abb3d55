"""What is remembered of the last layer, against plain loops in double precision."""

import pytest
import torch

from saflex_lightning.bank import FeatureBank, RunningMoments


class TestMoments:
    def test_averages_equal_plain_loops(self):
        generator = torch.Generator().manual_seed(0)
        moments, mean, covariance = RunningMoments(), None, None
        for _ in range(3):
            rows = torch.randn(6, 3, generator=generator, dtype=torch.float64)
            usable = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
            found = moments.update(rows, usable)
            kept = rows[usable > 0]
            own = kept.mean(0)
            spread = sum(torch.outer(row - own, row - own) for row in kept) / len(kept)
            mean = own if mean is None else 0.95 * mean + 0.05 * own
            covariance = spread if covariance is None else 0.95 * covariance + 0.05 * spread
        torch.testing.assert_close(found, (mean, covariance))

    def test_a_batch_without_usable_rows_changes_nothing(self):
        moments = RunningMoments()
        before = moments.update(torch.randn(4, 2), torch.ones(4))
        assert all(map(torch.equal, moments.update(torch.randn(4, 2), torch.zeros(4)), before))

    def test_the_first_batch_with_usable_rows_starts_the_averages(self):
        rows = torch.randn(4, 2)
        late, first = RunningMoments(), RunningMoments()
        assert all(part.eq(0).all() for part in late.update(rows, torch.zeros(4)))
        found, expected = late.update(rows, torch.ones(4)), first.update(rows, torch.ones(4))
        assert all(map(torch.equal, found, expected))


class TestBank:
    def rows(self, first, size):
        numbers = torch.arange(first, first + size, dtype=torch.float64)
        features = torch.stack([numbers, -numbers], 1)
        labels = torch.eye(3).double()[numbers.long() % 3]
        return features, numbers.unsqueeze(1).expand(-1, 3), labels

    def test_the_newest_rows_of_one_pass_are_kept(self):
        bank = FeatureBank(10)
        for first in range(0, 24, 4):
            bank.add(*self.rows(first, 4))
            features, residuals, labels, present = bank.read()
            newest = torch.arange(max(0, first + 4 - 10), first + 4)
            assert sorted(features[:, 0].tolist()) == newest.tolist()
            assert residuals[:, 1].equal(features[:, 0])
            assert labels.argmax(1).equal(features[:, 0].long() % 3)
            assert present.eq(1).all()

    def test_rows_with_a_non_finite_number_are_absent(self):
        features, residuals, labels = self.rows(1, 4)
        features[1, 0], residuals = torch.nan, residuals.clone()
        residuals[2, 1] = torch.inf
        bank = FeatureBank(10)
        bank.add(features, residuals, labels)
        features, residuals, _, present = bank.read()
        assert present.tolist() == [1, 0, 0, 1]
        assert features[1:3].eq(0).all()
        assert residuals[1:3].eq(0).all()

    def test_smaller_batches_leave_places_that_are_absent(self):
        bank = FeatureBank(12)
        for size in (4, 2, 4):
            bank.add(*self.rows(0, size))
        assert bank.read()[-1].sum() == 10

    def test_a_restored_bank_goes_on_alike(self):
        bank, copy = FeatureBank(6), FeatureBank(6)
        bank.add(*self.rows(0, 4))
        copy.load_state_dict(bank.state_dict())
        for one in (bank, copy):
            one.add(*self.rows(4, 4))
        assert all(map(torch.equal, bank.read(), copy.read()))

    def test_reading_an_empty_bank(self):
        with pytest.raises(RuntimeError, match="Expected `add` to be called before `read`"):
            FeatureBank(3).read()
