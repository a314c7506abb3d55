"""The extra pass on the augmented rows alone: where it is allowed, and that it changes nothing."""

import pytest
import torch
from helpers.cases import random_direction
from helpers.models import CLASSES, PerSample
from torch import Tensor, nn

from saflex_lightning.engines import RowSubset, make_engine, make_tangent

AUGMENTED = torch.tensor([False, True, False, True, True, False])
ROWS = AUGMENTED.nonzero().squeeze(-1)


def make(seed: int = 0, **options) -> tuple[PerSample, Tensor]:
    torch.manual_seed(seed)
    return PerSample(**options), torch.randn(6, 5)


def probe_rows(subset: RowSubset, model: nn.Module, inputs: Tensor, augmented=AUGMENTED):
    """Return the rows that the extra pass would compute, None meaning all."""
    return subset.probe(model, (inputs,), {}, augmented)[1]


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode", "head"])
def test_an_independent_model_is_probed_on_augmented_rows_and_gives_the_same_tangent(name):
    model, inputs = make()
    engine = make_engine(name, model, head=model.head if name == "head" else None)
    tangent = make_tangent(random_direction(engine.params))
    probe, rows = RowSubset(model).probe(model, (inputs,), {}, AUGMENTED)
    assert torch.equal(rows, ROWS)
    model.rows.clear()
    scores, some = engine.measure(lambda: model(inputs), tangent, probe=probe, rows=rows)
    first = {"finite_difference": [3, 3, 6], "forward_mode": [3, 6], "head": [6]}
    assert model.rows == first[name]  # finite differences check themselves the first time
    every_score, everything = engine.measure(lambda: model(inputs), tangent)
    assert torch.equal(scores, every_score)
    torch.testing.assert_close(some, everything[rows], rtol=5e-3, atol=5e-4)


def test_a_dropout_rate_that_starts_at_zero_is_looked_at_again():
    model, inputs = make(dropout=0.5)
    part = next(part for part in model.modules() if isinstance(part, nn.Dropout))
    rate, part.p = part.p, 0.0
    subset = RowSubset(model)
    assert torch.equal(probe_rows(subset, model, inputs), ROWS)
    part.p = rate
    assert probe_rows(subset, model, inputs) is None


def test_synchronized_batch_norm_is_not_tried_in_training_mode():
    model, inputs = make(norm=True)
    model.norm = nn.SyncBatchNorm(8)
    assert probe_rows(RowSubset(model), model, inputs) is None
    assert model.rows == []
    model.eval()
    assert torch.equal(probe_rows(RowSubset(model), model, inputs), ROWS)


def test_keyword_inputs_are_cut_too():
    model, inputs = make()
    probe, rows = RowSubset(model).probe(model, (), {"inputs": inputs}, AUGMENTED)
    torch.testing.assert_close(probe(), model(inputs)[rows])


@pytest.mark.parametrize("options", [{"norm": True}, {"dropout": 0.2}])
def test_models_whose_rows_depend_on_the_batch_use_all_rows_in_training_mode(options):
    model, inputs = make(**options)
    subset = RowSubset(model)
    assert probe_rows(subset, model, inputs) is None
    model.eval()
    assert torch.equal(probe_rows(subset, model, inputs), ROWS)
    model.train()
    assert probe_rows(subset, model, inputs) is None


def test_the_answer_is_kept_until_a_mode_changes():
    model, inputs = make(norm=True)
    subset = RowSubset(model)
    probe_rows(subset, model, inputs)
    assert model.rows == [6, 3]
    probe_rows(subset, model, inputs)
    assert model.rows == [6, 3]
    model.norm.eval()
    assert torch.equal(probe_rows(subset, model, inputs), ROWS)
    assert model.rows == [6, 3, 6, 3]


def test_deciding_leaves_buffers_and_random_state_alone():
    model, inputs = make(norm=True, dropout=0.2)
    before, state = model.norm.running_mean.clone(), torch.get_rng_state()
    probe_rows(RowSubset(model), model, inputs)
    assert torch.equal(model.norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_starts_at_zero_decides_nothing():
    model, inputs = make(norm=True)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    subset = RowSubset(model)
    assert probe_rows(subset, model, inputs) is None
    nn.init.normal_(model.head.weight)
    assert probe_rows(subset, model, inputs) is None  # batch statistics, seen now
    plain, _ = make()
    nn.init.zeros_(plain.head.weight)
    nn.init.zeros_(plain.head.bias)
    subset = RowSubset(plain)
    assert probe_rows(subset, plain, inputs) is None
    nn.init.normal_(plain.head.weight)
    assert torch.equal(probe_rows(subset, plain, inputs), ROWS)


def test_a_model_that_cannot_score_so_few_rows_uses_all():
    model, inputs = make(norm=True)
    one = torch.arange(6) == 2  # batch statistics of one row do not exist
    assert probe_rows(RowSubset(model), model, inputs, one) is None


@pytest.mark.parametrize("augmented", [torch.zeros(6, dtype=bool), torch.ones(6, dtype=bool)])
def test_all_or_no_rows_augmented_need_no_decision(augmented):
    model, inputs = make()
    assert probe_rows(RowSubset(model), model, inputs, augmented) is None
    assert model.rows == []


def test_inputs_without_a_row_per_sample_use_all_rows():
    model, inputs = make()

    def scores(values: Tensor, scale: object) -> Tensor:
        return model(values)

    for scale in (2.0, torch.tensor(2.0), torch.ones(3)):
        assert RowSubset(model).probe(scores, (inputs, scale), {}, AUGMENTED) == (None, None)


def test_contrastive_scores_use_all_rows():
    model, inputs = make()

    def scores(values: Tensor) -> tuple[Tensor, Tensor]:
        similarity = model(values) @ model(values).T
        return similarity, similarity.T

    assert RowSubset(model).probe(scores, (inputs,), {}, AUGMENTED) == (None, None)


def test_several_tasks_are_cut_together():
    model, inputs = make()
    probe, rows = RowSubset(model).probe(
        lambda values: (model(values), -model(values)), (inputs,), {}, AUGMENTED
    )
    assert [tuple(task.shape) for task in probe()] == 2 * [(len(rows), CLASSES)]


def test_a_failing_model_shows_its_own_error():
    model, _ = make()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        probe_rows(RowSubset(model), model, torch.randn(6, 3))
