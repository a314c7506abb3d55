"""The perceptron and SAINT against plain loops in float64, and what the engines make of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import dense_tangent, random_direction, relative_error
from helpers.solving import build_engine, measure, val_gradient
from torch import nn

from saflex_lightning.engines import descent_direction
from saflex_lightning.recipes.tabular import SAINT, TabularMLP

NUMERIC, CARDINALITIES, CLASSES, ROWS = 3, (4, 3), 2, 5
SMALL = {"dim": 4, "heads": 2, "head_width": 6}


def make_rows(rows=ROWS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    numeric = torch.randn(rows, NUMERIC, generator=generator, dtype=dtype)
    codes = [torch.randint(size, (rows,), generator=generator) for size in CARDINALITIES]
    return numeric, torch.stack(codes, dim=1)


def make(kind, *, cardinalities=CARDINALITIES, dtype=torch.float64, **settings):
    torch.manual_seed(1)
    if kind is SAINT:
        settings = {**SMALL, **settings}
    else:
        settings = {"width": 8, "embedding_dim": 3, **settings}
    return kind(NUMERIC, CLASSES, cardinalities=cardinalities, **settings).to(dtype)


def linear(layer, vector):
    """W v + b, entry by entry."""
    bias = [0.0] * len(layer.weight) if layer.bias is None else layer.bias.tolist()
    return [
        sum(w * v for w, v in zip(row, vector, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


def normalized(layer, vector):
    mean = sum(vector) / len(vector)
    variance = sum((v - mean) ** 2 for v in vector) / len(vector)
    scale = 1 / math.sqrt(variance + layer.eps)
    gains, shifts = layer.weight.tolist(), layer.bias.tolist()
    return [(v - mean) * scale * g + s for v, g, s in zip(vector, gains, shifts, strict=True)]


def attended(block, tokens):
    """Self-attention over a list of tokens, one head, query and key at a time."""
    parts = [linear(block.project, normalized(block.norm, token)) for token in tokens]
    size = len(parts[0]) // 3
    width = size // block.heads
    results = []
    for number, token in enumerate(tokens):
        mixed = []
        for head in range(block.heads):
            here = slice(head * width, (head + 1) * width)
            query = parts[number][:size][here]
            keys = [part[size : 2 * size][here] for part in parts]
            values = [part[2 * size :][here] for part in parts]
            scores = [
                math.exp(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(width))
                for key in keys
            ]
            for place in range(width):
                total = sum(s * value[place] for s, value in zip(scores, values, strict=True))
                mixed.append(total / sum(scores))
        results.append([t + m for t, m in zip(token, linear(block.merge, mixed), strict=True)])
    return results


def fed_forward(block, token):
    wide = linear(block.widen, normalized(block.norm, token))
    half = len(wide) // 2
    gated = [
        value * gate * 0.5 * (1 + math.erf(gate / math.sqrt(2)))
        for value, gate in zip(wide[:half], wide[half:], strict=True)
    ]
    return [t + n for t, n in zip(token, linear(block.narrow, gated), strict=True)]


def tokens_of(model, numbers, codes):
    """The answer token, one token per level, one per number, of one row."""
    embed = model.embed
    tokens = [embed.answer.tolist()]
    for column, code in enumerate(codes):
        tokens.append(embed.levels.weight[sum(CARDINALITIES[:column]) + code].tolist())
    for column, number in enumerate(numbers):
        weights, biases = embed.weight_in[column].tolist(), embed.bias_in[column].tolist()
        hidden = [max(0.0, number * w + b) for w, b in zip(weights, biases, strict=True)]
        out = embed.weight_out[column].T.tolist()
        tokens.append(
            [
                sum(h * w for h, w in zip(hidden, row, strict=True)) + b
                for row, b in zip(out, embed.bias_out[column].tolist(), strict=True)
            ]
        )
    return tokens


def looped_saint(model, numeric, categorical, attention, depth):
    """SAINT without a tensor operation: lists of rows of tokens of numbers."""
    rows = [
        tokens_of(model, numbers, codes)
        for numbers, codes in zip(numeric.tolist(), categorical.tolist(), strict=True)
    ]
    blocks = iter(model.blocks)
    for _ in range(depth):
        if "col" in attention:
            attend, feed = next(blocks), next(blocks)
            rows = [[fed_forward(feed, t) for t in attended(attend, row)] for row in rows]
        if "row" in attention:
            attend, feed = next(blocks).block, next(blocks).block
            flat = attended(attend, [[x for token in row for x in token] for row in rows])
            flat = [fed_forward(feed, row) for row in flat]
            dim = len(rows[0][0])
            rows = [[row[i : i + dim] for i in range(0, len(row), dim)] for row in flat]
    first, _, last = model.head
    logits = [linear(last, [max(0.0, h) for h in linear(first, row[0])]) for row in rows]
    return torch.tensor(logits, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("attention", ["colrow", "col", "row"])
def test_saint_equals_plain_loops(attention, depth):
    model = make(SAINT, attention=attention, depth=depth).eval()
    for parameter in model.parameters():
        parameter.mul_(1.5)  # away from where attention is nearly even
    rows = make_rows()
    expected = looped_saint(model, *rows, attention, depth)
    torch.testing.assert_close(model(*rows), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_mlp_equals_plain_loops():
    model = make(TabularMLP, depth=2).eval()
    numeric, categorical = make_rows()
    expected = []
    for numbers, codes in zip(numeric.tolist(), categorical.tolist(), strict=True):
        features = list(numbers)
        for column, code in enumerate(codes):
            features += model.embed.weight[sum(CARDINALITIES[:column]) + code].tolist()
        for layer in (model.hidden[0], model.hidden[3]):
            features = [max(0.0, value) for value in linear(layer, features)]
        expected.append(linear(model.head, features))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(model(numeric, categorical), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_has_the_layers_asked_for(batch_norm):
    model = TabularMLP(41, 2, batch_norm=batch_norm, dropout=0.3)
    kinds = [nn.Linear, *([nn.BatchNorm1d] if batch_norm else []), nn.ReLU, nn.Dropout] * 2
    assert [type(layer) for layer in model.hidden] == kinds
    sizes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert sizes == [(256, 41), (256, 256), (2, 256)]
    assert model.hidden[-1].p == 0.3


@pytest.mark.parametrize("kind", [TabularMLP, SAINT])
def test_columns_of_one_kind_are_enough(kind):
    numeric, categorical = make_rows()
    model = make(kind, cardinalities=None).eval()
    assert model(numeric, categorical[:, :0]).shape == (ROWS, CLASSES)
    torch.manual_seed(1)
    settings = SMALL if kind is SAINT else {}
    model = kind(0, CLASSES, cardinalities=CARDINALITIES, **settings).double().eval()
    assert model(numeric[:, :0], categorical).shape == (ROWS, CLASSES)


@pytest.mark.parametrize(("columns", "dim"), [(100, 32), (101, 8)])
def test_tokens_are_small_where_columns_are_many(columns, dim):
    assert SAINT(columns, 2, attention="col").embed.answer.shape == (dim,)


def test_saint_starts_with_the_sizes_of_its_authors():
    model = SAINT(41, 2)
    attend, feed, attend_rows, feed_rows = model.blocks
    assert attend.project.weight.shape == (3 * 4 * 16, 32)
    assert feed.widen.weight.shape == (2 * 4 * 32, 32)
    assert attend_rows.block.project.weight.shape == (3 * 4 * 64, 32 * 42)
    assert feed_rows.block.narrow.weight.shape == (32 * 42, 4 * 32 * 42)
    assert feed.dropout.p == feed_rows.block.dropout.p == 0.8
    bound = 1 / math.sqrt(100)
    assert model.embed.weight_out.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.embed.weight_in.abs().max().item() == pytest.approx(1.0, rel=1e-2)


def test_unknown_attention():
    with pytest.raises(ValueError, match=r"`attention` to be one of \['col', 'colrow', 'row'\]"):
        make(SAINT, attention="rows")


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "depends"), [("colrow", True), ("row", True), ("col", False)]
)
def test_rows_of_a_batch_depend_on_each_other_by_row_attention_alone(attention, depends):
    model = make(SAINT, attention=attention).eval()
    numeric, categorical = make_rows()
    together = model(numeric, categorical)
    for size in (1, 2):  # every batch size is served
        alone = model(numeric[:size], categorical[:size])
        assert torch.allclose(together[:size], alone, atol=1e-12) != depends


NETWORKS = {
    "mlp": lambda dtype: make(TabularMLP, dropout=0.3, dtype=dtype),
    "mlp, batch norm": lambda dtype: make(TabularMLP, batch_norm=True, dtype=dtype),
    "saint": lambda dtype: make(SAINT, dropout=0.5, dtype=dtype),
    "saint, columns": lambda dtype: make(SAINT, attention="col", dtype=dtype),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine_name", ["finite_difference", "forward_mode", "head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_engines_against_the_dense_tangent(network, engine_name, dtype):
    model = NETWORKS[network](dtype).train()
    numeric, categorical = make_rows(dtype=dtype)
    engine = build_engine(engine_name, model, lambda: model(numeric, categorical))
    direction = random_direction(engine.params)
    along = descent_direction([-part for part in direction])
    torch.manual_seed(5)
    scores, found = measure(engine, lambda: model(numeric, categorical), along)

    reference = NETWORKS[network](torch.float64).train()
    reference.load_state_dict(model.state_dict())
    positions = {id(p): place for place, p in enumerate(model.parameters())}
    params = list(reference.parameters())
    matched = [params[positions[id(p)]] for p in engine.params]
    torch.manual_seed(5)
    expected = reference(numeric.double(), categorical)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=tolerance)
    error = relative_error(found, dense_tangent(expected, matched, direction))
    exact = engine_name != "finite_difference"
    limits = {torch.float64: 1e-12 if exact else 1e-5, torch.float32: 2e-5 if exact else 2e-2}
    assert error < limits[dtype]


@pytest.mark.parametrize("engine_name", ["finite_difference", "forward_mode", "head"])
def test_validation_gradient_of_saint_is_that_of_its_batch(engine_name):
    model = make(SAINT).train()
    numeric, categorical = make_rows(7)
    target = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    engine = build_engine(engine_name, model, lambda: model(numeric, categorical))
    found = val_gradient(
        engine,
        model,
        lambda: model(numeric, categorical),
        lambda scores: F.cross_entropy(scores, target),
    )
    loss = F.cross_entropy(model.eval()(numeric, categorical), target)
    for one, other in zip(found, torch.autograd.grad(loss, engine.params), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
