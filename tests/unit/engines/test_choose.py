"""What ``engine="auto"`` chooses, that it is exact, and that a resumed run has it too."""

import copy

import pytest
import torch
from helpers.cases import dense_tangent, random_direction, relative_error
from helpers.heads import HEADS, Cosine, Model, make_pooled_convolution, make_scaled, on_body
from helpers.models import CLASSES, make_mlp
from helpers.solving import build_engine, measure
from torch import Tensor, nn

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.engines.choose import Matching
from saflex_lightning.functional.losses import as_tuple
from saflex_lightning.functional.settings import PRESETS, make_settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"
)
INPUTS = torch.linspace(-1, 1, 30).view(6, 5)


def names_of(engine, model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in engine.params]


def chosen(model: nn.Module, inputs: Tensor = INPUTS, **options) -> tuple[str, list[str]]:
    engine = build_engine("auto", model, lambda: model(inputs), **options)
    return engine.name, names_of(engine, model)


def derivative(engine, model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    direction = descent_direction([-part for part in random_direction(engine.params)])
    return as_tuple(measure(engine, lambda: model(inputs), direction)[1])


def reference(engine, model: nn.Module, inputs: Tensor) -> list[Tensor]:
    params = engine.params
    if hasattr(model, "embed"):  # the head engine sees a tied matrix as a head alone
        model = copy.deepcopy(model)
        model.embed = copy.deepcopy(model.embed)
        params = [model.head.weight]
    torch.manual_seed(7)
    tasks, direction = as_tuple(model(inputs)), random_direction(params)
    return [dense_tangent(scores.double(), params, direction) for scores in tasks]


@pytest.mark.parametrize("name", HEADS)
def test_auto_finds_the_layer_that_makes_the_scores(name):
    head = HEADS[name]
    assert chosen(*head.build()) == (head.engine, list(head.params))


@pytest.mark.parametrize("name", HEADS)
def test_auto_is_exact_for_that_layer(name):
    model, inputs = HEADS[name].build()
    engine = build_engine("auto", model, lambda: model(inputs))
    expected = reference(engine, model, inputs)
    for part, expected_part in zip(derivative(engine, model, inputs), expected, strict=True):
        assert part.dtype == torch.float64
        assert expected_part.norm() > 1e-3
        assert relative_error(part, expected_part) < 1e-12


@pytest.mark.parametrize("name", HEADS)
def test_a_resumed_run_has_the_engine_that_was_chosen(name):
    model, inputs = HEADS[name].build()
    settings, held = PRESETS["gradient"], list(model.parameters())
    first, second = Matching(settings), Matching(settings)
    assert not first.fits(model, held)
    assert first.choose(model, lambda: model(inputs), None, held)
    assert not first.choose(model, lambda: model(inputs), None, held)  # the same again
    second.load_state_dict(first.state_dict())
    second.start(model)
    assert first.fits(model, held)
    assert second.fits(model, held)
    assert second.describe() == first.describe()
    assert second.state_dict() == first.state_dict()
    found = [derivative(one.engine, model, inputs) for one in (first, second)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("engine", ["finite_difference", "forward_mode", "head"])
def test_a_resumed_run_has_the_engine_that_was_named(engine):
    model, settings = make_mlp(), make_settings("gradient", engine=engine)
    first, second = Matching(settings), Matching(settings)
    first.choose(model, lambda: model(INPUTS), None, [])
    second.load_state_dict(first.state_dict())
    second.start(model)
    assert second.engine.name == engine
    found = [derivative(one.engine, model, INPUTS) for one in (first, second)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "forward_mode"}, "engine 'forward_mode' over all trained parameters"),
        ({"engine": "finite_difference", "params": ["0.*"]}, "engine 'finite_difference' over `0`"),
        ({"params": ["*.weight"]}, "engine 'forward_mode' over `0`, `2`"),
        ({}, "engine 'head' over `2`"),
    ],
)
def test_an_engine_is_described_by_what_it_matches(settings, words):
    model, matching = make_mlp(), Matching(make_settings("gradient", **settings))
    matching.choose(model, lambda: model(INPUTS), None, [])
    assert matching.describe() == words


@pytest.mark.parametrize(
    ("patterns", "params"),
    [(["2.*"], ["2.weight", "2.bias"]), (["*.bias"], ["0.bias", "2.bias"])],
)
def test_patterns_are_served_by_forward_mode(patterns, params):
    model, inputs = HEADS["perceptron"].build()
    engine = make_engine("auto", model, params=patterns)  # needs no pass
    assert (engine.name, names_of(engine, model)) == ("forward_mode", params)
    (found,), (expected,) = derivative(engine, model, inputs), reference(engine, model, inputs)
    assert relative_error(found, expected) < 1e-12


def test_a_head_that_is_named_is_taken_where_it_makes_the_scores():
    model = make_mlp()
    assert chosen(model, head=model[2]) == ("head", ["2.weight", "2.bias"])
    assert chosen(model, head=model[0]) == ("forward_mode", ["2.weight", "2.bias"])


def test_parameters_that_no_optimizer_holds_are_left_out():
    model, photos = make_pooled_convolution(), torch.randn(2, 3, 8, 8)
    assert chosen(model, photos, held=[model[2].weight]) == ("forward_mode", ["2.weight"])
    held = list(model[0].parameters())
    assert chosen(model, photos, held=held) == ("forward_mode", ["0.weight", "0.bias"])


def test_a_model_without_any_matrix_is_matched_as_a_whole():
    model = nn.Sequential(nn.LayerNorm(5), nn.Softmax(-1))
    assert chosen(model) == ("forward_mode", ["0.weight", "0.bias"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_scores_that_tell_nothing_are_no_reason_against_a_head(value):
    model = make_mlp()
    nn.init.constant_(model[2].weight, value)
    assert chosen(model) == ("head", ["2.weight", "2.bias"])


class ScaledLinear(nn.Linear):
    """A linear layer with one more parameter, which does nothing at first."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(self.out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)


def test_a_factor_inside_a_kind_of_linear_layer_is_no_head():
    engine, params = chosen(on_body(ScaledLinear(8, CLASSES)))
    assert (engine, params) == ("forward_mode", ["head.weight", "head.bias", "head.scale"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_scaled(lambda self, scores: scores.mul_(self.scale)),
        lambda: Model(
            lambda self, x: (self.head(self.body(x)), self.head(self.body(x) + 1))[0],
            head=nn.Linear(8, CLASSES),
        ),
    ],
    ids=["in-place factor of 1", "head called again for something else"],
)
def test_auto_chooses_no_engine_that_refuses_the_model(make):
    model = make()
    engine = build_engine("auto", model, lambda: model(INPUTS))
    derivative(engine, model, INPUTS)


def test_choosing_needs_no_graph_of_the_caller_s():
    model = make_scaled(lambda self, scores: self.scale * scores)
    with torch.no_grad():
        assert chosen(model)[0] == "forward_mode"
        assert chosen(on_body(nn.Linear(8, CLASSES)))[0] == "head"


def test_choosing_sees_through_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(make_mlp())[0] == "head"
        assert chosen(on_body(Cosine()))[0] == "forward_mode"
