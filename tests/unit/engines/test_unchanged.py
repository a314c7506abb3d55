"""Nothing but the scores may show that an engine was at work."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CASES, ENGINES, random_direction
from helpers.models import CLASSES, Recurrent, Restless
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saflex_lightning.engines import (
    make_engine,
    make_tangent,
    unchanged_generators,
    unchanged_state,
)

TARGET = torch.arange(6) % CLASSES


class Interrupted(Exception):
    """What a model's own code raises here."""


def slots(module: nn.Module) -> list[tuple[str, object]]:
    """Return every parameter and buffer by name, tied and aliased ones at each of their names."""
    return [
        (f"{name}.{key}", tensor)
        for name, part in module.named_modules(remove_duplicate=False)
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]
    ]


def contents(module: nn.Module) -> list:
    """Return all that an engine could change, as values."""

    def value(tensor: Tensor | None) -> object:
        return None if tensor is None else tensor.detach().numpy().tobytes()

    return [
        [(name, value(tensor)) for name, tensor in slots(module)],
        [value(parameter.grad) for parameter in module.parameters()],
        [part.training for part in module.modules()],
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.set_autocast_enabled,
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
    ]


def make_restless() -> tuple[Restless, Tensor]:
    """Return a model in mixed modes, with gradients from an earlier step."""
    torch.manual_seed(0)
    model = Restless()
    inputs = torch.randn(6, 5)
    F.cross_entropy(model(inputs), TARGET).backward()
    model.norm.eval()
    return model, inputs


def find_head(engine, model: nn.Module, inputs: Tensor) -> None:
    if engine.name == "head":
        engine.gradient(lambda: model(inputs), lambda scores: scores.sum())


@pytest.mark.parametrize("name", ENGINES)
def test_gradient_leaves_everything_as_it_was(name):
    model, inputs = make_restless()
    engine = make_engine(name, model)
    before, identities = contents(model), [id(tensor) for _, tensor in slots(model)]
    engine.gradient(lambda: model(inputs), lambda scores: F.cross_entropy(scores, TARGET))
    assert contents(model) == before
    assert [id(tensor) for _, tensor in slots(model)] == identities


@pytest.mark.parametrize("name", ENGINES)
def test_measure_does_what_the_forward_alone_does(name):
    model, inputs = make_restless()
    engine = make_engine(name, model)
    find_head(engine, model, inputs)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    expected, expected_state = twin(inputs), contents(twin)
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    scores, _ = engine.measure(lambda: model(inputs), make_tangent(random_direction(engine.params)))
    assert torch.equal(scores, expected)
    assert contents(model) == expected_state
    F.cross_entropy(scores, TARGET).backward()
    F.cross_entropy(expected, TARGET).backward()
    assert contents(model) == contents(twin)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{model}-{name}")
        for model, case in CASES.items()
        for name in case.engines
        if not case.large
    ],
)
def test_parameters_come_back_by_identity_and_bit_for_bit(case, name):
    model, inputs = case.build()
    engine = make_engine(name, model)
    find_head(engine, model, inputs)
    before = [(key, id(tensor), tensor.detach().clone()) for key, tensor in parameters(model)]
    engine.measure(lambda: model(inputs), make_tangent(random_direction(engine.params)))
    for (key, tensor), (_, identity, value) in zip(parameters(model), before, strict=True):
        assert id(tensor) == identity, key
        assert torch.equal(tensor, value), key
        assert tensor.grad is None


def parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters(remove_duplicate=False))


def test_flat_weights_of_a_recurrent_layer_come_back():
    model = Recurrent()
    engine = make_engine("forward_mode", model)
    inputs = torch.randn(3, 5, 8)
    engine.measure(lambda: model(inputs), make_tangent(random_direction(engine.params)))
    assert model.lstm._flat_weights
    for name, weight in zip(model.lstm._flat_weights_names, model.lstm._flat_weights, strict=True):
        assert weight is getattr(model.lstm, name)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["validation forward", "validation loss", "probe", "forward"])
@pytest.mark.parametrize("name", ENGINES)
def test_exceptions_at_any_stage_leave_everything_as_it_was(name, stage, error):
    model, inputs = make_restless()
    engine = make_engine(name, model)
    find_head(engine, model, inputs)
    tangent = make_tangent(random_direction(engine.params))
    before, identities = contents(model), [id(tensor) for _, tensor in slots(model)]

    def fail(*_: object) -> Tensor:
        raise error("own words")

    def fail_in_the_model() -> Tensor:
        model.on_forward = fail
        try:
            return model(inputs)
        finally:
            model.on_forward = lambda: None

    def run() -> None:
        if stage == "validation forward":
            engine.gradient(fail_in_the_model, lambda scores: scores.sum())
        elif stage == "validation loss":
            engine.gradient(lambda: model(inputs), fail)
        elif stage == "probe" and name != "head":  # that engine has none
            engine.measure(lambda: model(inputs), tangent, probe=fail_in_the_model)
        else:
            engine.measure(fail, tangent)

    with pytest.raises(error, match="own words"):
        run()
    assert contents(model) == before
    assert [id(tensor) for _, tensor in slots(model)] == identities


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_recorded_before_the_extra_pass_stays_valid(name):
    model, inputs = CASES["mlp"].build()
    engine = make_engine(name, model)
    find_head(engine, model, inputs)
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    earlier = model(inputs).square().sum()
    engine.measure(lambda: model(inputs), make_tangent(random_direction(engine.params)))
    found = torch.autograd.grad(earlier, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_random_state_is_restored_after_an_exception():
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def draw_and_fail() -> None:
        with unchanged_generators([]):
            draw()
            raise Interrupted

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    with pytest.raises(Interrupted):
        draw_and_fail()
    assert draw() == expected


@pytest.mark.parametrize("name", ENGINES)
def test_the_training_forward_runs_once_and_last(name):
    model, inputs = CASES["mlp"].build()
    engine = make_engine(name, model)
    find_head(engine, model, inputs)
    calls = []

    def run(label: str) -> Tensor:
        calls.append(label)
        return model(inputs)

    engine.measure(
        lambda: run("forward"),
        make_tangent(random_direction(engine.params)),
        probe=lambda: run("probe"),
    )
    extra = {"finite_difference": 2, "forward_mode": 1, "head": 0}  # one of the two checks itself
    assert calls == [*extra[name] * ["probe"], "forward"]


def test_state_is_kept_by_as_many_copies_whatever_the_number_of_buffers():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "copy" in str(func) or "clone" in str(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 9):
        model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
        with Copies() as copies, unchanged_state(model):
            model(torch.randn(8, 4))
        counts.append(copies.count)
    assert 0 < counts[0] == counts[1]


class Merging(nn.Module):
    """Changes its weight where it is put in evaluation mode, as LoRA merges its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)

    def train(self, mode: bool = True) -> "Merging":
        if not mode:
            self.head.weight.data.add_(1.0)
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_model_does_on_its_way_to_evaluation_is_not_done(name):
    torch.manual_seed(0)
    model, inputs = Merging(), torch.randn(6, 5)
    before = contents(model)
    engine = make_engine(name, model)
    engine.gradient(lambda: model(inputs), lambda scores: F.cross_entropy(scores, TARGET))
    assert contents(model) == before


@pytest.mark.parametrize("name", ENGINES)
def test_a_buffer_whose_entries_share_memory_is_left_alone(name):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, CLASSES)), torch.randn(6, 5)
    model.register_buffer("prior", torch.tensor(-1.1).expand(CLASSES))
    engine = make_engine(name, model)

    def forward() -> Tensor:
        return model[0](inputs) if name == "head" else model[0](inputs) + model.prior

    gradient = engine.gradient(forward, lambda scores: F.cross_entropy(scores, TARGET))
    engine.measure(forward, make_tangent(gradient))
    assert model.prior.tolist() == pytest.approx([-1.1] * CLASSES)
