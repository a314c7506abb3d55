"""The benchmarks of steps: rivals that must agree, counts by hand, and what is sent by theory."""

from functools import partial

import pytest
import torch
from helpers.benchmarks import load_benchmark
from torch import nn

models, step_time = load_benchmark("step_models"), load_benchmark("step_time")
growth = load_benchmark("step_growth")
CASES, CLASSES, Cell = models.CASES, models.CLASSES, models.Cell


def make_module(net, kind, rows=12):
    module = models.Net(Cell("qsar", "union", kind), rows)
    module.net = net
    module.on_fit_start()
    return module


def test_three_ways_to_inner_products_weigh_rows_alike():
    """A look ahead from weights 0, gradients of single rows, and layers' inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(41, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False))
    (batch, *_) = models.draw_batches(CASES["qsar"], 12, union=True)
    found = []
    for kind in ("learning to reweight", "per-sample gradients", "ghost products"):
        module = make_module(net, kind)
        torch.manual_seed(1)  # of the validation rows
        loss = module.rival(batch)
        loss.backward()
        found.append((loss.detach(), *(p.grad.clone() for p in net.parameters())))
        net.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert found[0][0] != torch.nn.functional.cross_entropy(net(batch.inputs), batch.target)


def test_ghost_products_of_a_convolution():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 41)),
        nn.Unflatten(2, (1, 41)),
        nn.Conv2d(1, 2, (1, 5), stride=(1, 4), bias=False),
        nn.Flatten(),
        nn.Linear(20, CLASSES, bias=False),
    )
    (batch, *_) = models.draw_batches(CASES["qsar"], 12, union=True)
    losses = []
    for kind in ("per-sample gradients", "ghost products"):
        module = make_module(net, kind)
        torch.manual_seed(1)
        losses.append(module.rival(batch))
    torch.testing.assert_close(*losses)


@pytest.fixture
def args():
    parser = step_time.make_parser("A test")
    parsed = parser.parse_args(["--seconds", "0", "--device", "cpu", "--batch-size", "16"])
    parsed.memory = False
    return parsed


@pytest.mark.parametrize("kind", ["robust", "selective backprop"])
def test_a_row_of_results(kind, args):
    row = step_time.measure(Cell("qsar", "union", kind), args)
    assert row["blocks"] == step_time.FEWEST_BLOCKS
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    linears = 41 * 256 + 256 * 256 + 256 * CLASSES
    # An extra forward, then half of the rows; a plain step has no gradient of the first inputs.
    plain = 2 * linears + (linears - 41 * 256)
    if kind == "robust":
        assert 1 < row["flops"] < 1.2
        assert 50 < row["launches"] < 115
        assert row["waits"] > 0
    else:
        assert row["flops"] == pytest.approx((linears + plain / 2) / plain)
        assert row["launches"] < 20
        assert row["waits"] == 0
    assert " robust |" in step_time.table_row(
        {"model": "qsar", "batch": "union", "kind": "robust", **row}, {}
    )


def test_what_cannot_be_done_is_a_line(args, capsys):
    args.models, args.kinds, args.json = ["resnet18"], ["per-sample gradients"], None
    args.batch_size = 8
    (row,) = step_time.run(args)["rows"]
    assert "in-place operation" in row["refused"]  # of batch normalization, on single rows
    assert "| per-sample gradients | RuntimeError |" in capsys.readouterr().out


def test_a_file_is_gone_on_with(args, tmp_path):
    args.models, args.kinds, args.json = ["qsar"], ["ELR"], str(tmp_path / "rows.json")
    first = step_time.run(args)
    assert step_time.run(args) == first
    args.threads += 1
    with pytest.raises(SystemExit, match="Name another file"):
        step_time.run(args)


def test_growth_by_theory():
    assert growth.sent_by_theory(1) == 0
    assert growth.sent_by_theory(2) == 4 * 97 + (2 * 128 * 16 + 8) + 2 * 32 * 25 * 4 / 4
    full, diagonal = (
        growth.discriminant_operations(10, diagonal=diagonal) for diagonal in (False, True)
    )
    assert full - diagonal == pytest.approx(3 * (2 * 2048 * 100 + 13 / 3 * 1000) / 12)
    assert growth.width_of(10**6) == 965
    lines = growth.table_lines(
        [
            {"axis": "batch", "size": 32, "plain": 1e-3, "extra": 1e-3, "quartiles": [0, 2e-3]},
            {"axis": "ranks", "size": 2, "calls": 5, "bytes": 10, "theory": 9},
        ]
    )
    assert "| batch | 32 | 1 ms | 1 ms (0 to 2) | | |" in lines
    assert "| 2 | 5.0 | 10 | 9 |" in lines


def test_each_way_in_which_the_cost_may_grow_is_measured(args):
    measures = [
        partial(growth.measure_point, "features", 64),
        partial(growth.measure_classes, 10, diagonal=True),
        partial(growth.measure_classes, 10, diagonal=False),
        partial(growth.measure_indices, 1000),
    ]
    for measure in measures:
        row = measure(args)
        assert row["quartiles"][0] <= row["extra"] <= row["quartiles"][1]
        assert row["theory"] > 0


@pytest.mark.slow
def test_what_ranks_send_is_what_theory_says(args):
    found = growth.measure_ranks(2, args)
    assert found["bytes"] == pytest.approx(found["theory"], rel=0.01)
