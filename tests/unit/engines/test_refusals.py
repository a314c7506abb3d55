"""What an engine says of a model it cannot serve, and that it says it of no other."""

import pytest
import torch
import torch.nn.functional as F
from helpers import solving
from helpers.cases import CASES, ENGINES, random_direction
from helpers.models import CLASSES, Checkpointed, Cubic, make_mlp, make_weight_norm
from helpers.solving import val_gradient
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from saflex_lightning.engines import UnsupportedModelError, descent_direction, make_engine

INPUTS = torch.linspace(-1, 1, 30).view(6, 5)
TARGET = torch.arange(6) % CLASSES


def build(name: str, model: nn.Module, inputs: Tensor = INPUTS, **options):
    return make_engine(name, model, lambda: model(inputs), **options)


def gradient(engine, model: nn.Module, inputs: Tensor = INPUTS) -> tuple[Tensor, ...]:
    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, TARGET)

    return val_gradient(engine, model, lambda: model(inputs), loss)


def measure(engine, model: nn.Module, inputs: Tensor = INPUTS) -> tuple[Tensor, Tensor]:
    direction = descent_direction(random_direction(engine.params))
    return solving.measure(engine, lambda: model(inputs), direction)


# Gradients

# Torch's hint at every evaluation of such a model.
ignore_hint = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@ignore_hint
@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_reentrant_checkpointing_is_refused(name):
    model = Checkpointed(use_reentrant=True)
    engine = build(name, model)
    with pytest.raises(UnsupportedModelError, match=r"checkpoint(.|\n)*Pass engine='head'"):
        gradient(engine, model)


@ignore_hint
def test_reentrant_checkpointing_works_with_the_head_engine():
    model = Checkpointed(use_reentrant=True)
    engine = build("head", model)
    gradient(engine, model)
    measure(engine, model)[0].sum().backward()
    assert model.embed.weight.grad is not None


# Forward mode


def test_a_custom_function_without_jvp_is_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 8))
    model.add_module("cubic", Cubic())
    model.add_module("out", nn.Linear(8, CLASSES))
    engine = make_engine("forward_mode", model)
    gradient(engine, model)
    with pytest.raises(
        UnsupportedModelError,
        match=r"`cubic` \(Cubic\) raised (.|\n)*Pass engine='finite_difference' or engine='head'",
    ):
        measure(engine, model)
    for name in ("finite_difference", "head"):
        other = build(name, model)
        gradient(other, model)
        measure(other, model)


def test_spectral_norm_is_refused_by_name_in_training_mode():
    model, inputs = CASES["spectral norm, train"].build()
    engine = make_engine("forward_mode", model)
    with pytest.raises(UnsupportedModelError, match=r"`0\.parametrizations\.weight\.0`"):
        measure(engine, model, inputs)
    measure(engine, model.eval(), inputs)


# Finite differences


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_refused(dtype):
    with pytest.raises(UnsupportedModelError, match=r"float32 or wider.*Pass engine='forward_mode"):
        make_engine("finite_difference", make_mlp().to(dtype))


# The head


class Flattened(nn.Module):
    """Something other than the head's own output as scores."""

    def __init__(self, change) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)
        self.change = change

    def forward(self, inputs: Tensor) -> Tensor:
        return self.change(self.head, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head, x: 2 * head(x), r"output of submodule `head` to be the scores"),
        (lambda head, x: head(x)[:, :2], r"output of submodule `head` to be the scores"),
        (lambda head, x: (head(x), head(x)), r"`head` to map \(batch, features\) to the scores"),
        (lambda head, x: head(x.unsqueeze(1))[:, 0], r"`head` to map \(batch, features\)"),
        (lambda head, x: F.linear(x, head.weight, head.bias), r"`nn.Linear` called"),
    ],
)
def test_scores_that_are_not_the_head_s_output_are_refused(change, message):
    model = Flattened(change)
    with pytest.raises(UnsupportedModelError, match=message + r"(.|\n)*`saflex_head\(\)`"):
        build("head", model)


def double_in_place(scores: Tensor) -> Tensor:
    with torch.no_grad():
        return scores.mul_(2)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda head, x: 2 * head(x), r"output of submodule `head` to be the scores"),
        (lambda head, x: head(x).flip(1), r"output of submodule `head` to be the scores"),
        (lambda head, x: head(x).mul_(2), r"output of submodule `head` to be the scores"),
        (lambda head, x: double_in_place(head(x)), r"output of submodule `head` to be the scores"),
        (lambda head, x: (head(x), head(x)), r"`head` to map \(batch, features\) to the scores"),
        (lambda head, x: head(x.unsqueeze(1))[:, 0], r"`head` to map \(batch, features\)"),
        (lambda head, x: F.linear(x, head.weight, head.bias), r"no call was seen"),
    ],
)
@pytest.mark.parametrize("stage", ["gradient", "measure"])
def test_scores_that_are_no_longer_the_head_s_output_are_refused(stage, later, message):
    model = Flattened(lambda head, x: head(x))
    engine = build("head", model)
    model.change = later
    run = {"gradient": gradient, "measure": measure}[stage]
    with pytest.raises(UnsupportedModelError, match=message):
        run(engine, model)
    assert not model.head._forward_hooks


def test_a_factor_that_is_still_1_is_refused():
    model = Flattened(lambda head, x: 1 * head(x))
    with pytest.raises(UnsupportedModelError, match=r"output of submodule `head` to be the scores"):
        build("head", model)
    model.change = lambda head, x: head(x)
    engine = build("head", model)
    model.change = lambda head, x: 1 * head(x)
    with pytest.raises(UnsupportedModelError, match=r"output of submodule `head` to be the scores"):
        measure(engine, model)


def test_an_output_that_is_changed_in_place_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"output of submodule `head` to be the scores"):
        build("head", Flattened(lambda head, x: head(x).mul_(2)))


def test_a_model_without_linear_layers_is_refused():
    model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, CLASSES, 5), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"leave it out\. Pass engine='forward_mode'"):
        build("head", model)


def test_a_head_of_another_type_is_refused():
    model = make_mlp()
    with pytest.raises(UnsupportedModelError, match=r"`nn\.Linear`, but got Sequential"):
        build("head", model, head=model)


def test_a_frozen_head_is_refused():
    model = make_mlp()
    model[-1].weight.requires_grad_(False)
    for head in (None, model[-1]):
        with pytest.raises(UnsupportedModelError, match=r"`2` is frozen"):
            build("head", model, head=head)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("normalize", [weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_head_whose_weight_is_computed_is_refused(normalize):
    model = make_weight_norm()
    model[-1] = normalize(nn.Linear(8, CLASSES))
    with pytest.raises(UnsupportedModelError, match=r"that of `2` is computed from others"):
        build("head", model)


def test_a_named_head_is_checked_against_the_scores():
    model = make_mlp()
    with pytest.raises(UnsupportedModelError, match=r"output of submodule `0` to be the scores"):
        build("head", model, head=model[0])
    with pytest.raises(UnsupportedModelError, match=r"submodule `head` called, but the scores us"):
        build("head", model, head=nn.Linear(5, CLASSES))


def test_scores_that_are_not_finite_are_no_reason_to_refuse_the_head():
    model = make_mlp()
    nn.init.constant_(model[0].weight, torch.nan)
    weight, bias = gradient(build("head", model), model)
    assert weight.isnan().all()
    assert bias.isnan().all()


def test_a_head_s_bias_may_be_frozen():
    model = make_mlp()
    model[-1].bias.requires_grad_(False)
    engine = build("head", model)
    assert [id(p) for p in engine.params] == [id(model[-1].weight)]
    assert [part.shape for part in gradient(engine, model)] == [model[-1].weight.shape]
    measure(engine, model)


@pytest.mark.parametrize("name", ["head", "auto"])
def test_a_head_is_found_by_a_pass_alone(name):
    with pytest.raises(ValueError, match=f"Expected `run` with engine='{name}'"):
        make_engine(name, make_mlp())


# Any engine


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("stage", ["gradient", "measure"])
def test_a_bug_of_the_user_s_own_shows_as_it_is(name, stage):
    model = make_mlp()
    engine = build(name, model)
    gradient(engine, model)
    wrong = torch.zeros(6, 3)  # the first layer wants five features
    run = {"gradient": gradient, "measure": measure}[stage]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(engine, model, wrong)


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_running_out_of_memory_is_not_blamed_on_the_model(name):
    model = make_mlp()
    engine = make_engine(name, model)

    def exhaust() -> Tensor:
        raise torch.cuda.OutOfMemoryError("own words")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="own words"):
        engine.gradient(exhaust, lambda scores: scores.sum())


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="'jacobian'"):
        build("jacobian", make_mlp())


def test_the_head_engine_takes_no_patterns():
    with pytest.raises(ValueError, match="remove `params`"):
        build("head", make_mlp(), params=["0.*"])


# Compiled models


def make_compiled() -> tuple[nn.Module, nn.Module]:
    model = make_mlp()
    return model, torch.compile(model, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_a_compiled_model_gives_the_same_jvp(name):
    model, compiled = make_compiled()
    expected, found = (measure(make_engine(name, one), one) for one in (model, compiled))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-3)
    found[0].sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_head_is_refused():
    _, compiled = make_compiled()
    compiled(INPUTS).sum().backward()
    with pytest.raises(UnsupportedModelError, match=r"an `nn\.Linear` called, but the scores used"):
        build("head", compiled)


def test_a_head_that_is_compiled_later_is_refused():
    model = make_mlp()
    engine = build("head", model)
    with pytest.raises(UnsupportedModelError, match=r"`torch\.compile`"):
        solving.measure(  # of code that calls no module
            engine,
            lambda: F.linear(model[:2](INPUTS), model[2].weight, model[2].bias),
            descent_direction(random_direction(engine.params)),
        )
