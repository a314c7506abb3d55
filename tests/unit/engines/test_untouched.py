"""Nothing but the scores may show that an engine was at work."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CASES, ENGINES, random_direction
from helpers.models import CLASSES, Recurrent, Restless, make_weight_norm
from helpers.solving import build_engine, measure, val_gradient
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saflex_lightning.engines import UnsupportedModelError, descent_direction, make_engine
from saflex_lightning.engines.untouched import (
    extra_pass,
    untouched,
    untouched_generators,
    unwritten,
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


def loss(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, TARGET)


def any_direction(engine):
    return descent_direction(random_direction(engine.params))


@pytest.mark.parametrize("name", ENGINES)
def test_gradient_leaves_everything_as_it_was(name):
    model, inputs = make_restless()
    engine = build_engine(name, model, lambda: model(inputs))
    before, identities = contents(model), [id(tensor) for _, tensor in slots(model)]
    val_gradient(engine, model, lambda: model(inputs), loss)
    assert contents(model) == before
    assert [id(tensor) for _, tensor in slots(model)] == identities


@pytest.mark.parametrize("name", ENGINES)
def test_measure_does_what_the_forward_alone_does(name):
    model, inputs = make_restless()
    engine = build_engine(name, model, lambda: model(inputs))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    expected, expected_state = twin(inputs), contents(twin)
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    scores, _ = measure(engine, lambda: model(inputs), any_direction(engine))
    assert torch.equal(scores, expected)
    assert contents(model) == expected_state
    loss(scores).backward()
    loss(expected).backward()
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
    engine = build_engine(name, model, lambda: model(inputs))
    before = [(key, id(tensor), tensor.detach().clone()) for key, tensor in parameters(model)]
    measure(engine, lambda: model(inputs), any_direction(engine))
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
    measure(engine, lambda: model(inputs), any_direction(engine))
    assert model.lstm._flat_weights
    for name, weight in zip(model.lstm._flat_weights_names, model.lstm._flat_weights, strict=True):
        assert weight is getattr(model.lstm, name)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["validation forward", "validation loss", "extra", "forward"])
@pytest.mark.parametrize("name", ENGINES)
def test_exceptions_at_any_stage_leave_everything_as_it_was(name, stage, error):
    model, inputs = make_restless()
    engine = build_engine(name, model, lambda: model(inputs))
    direction = any_direction(engine)
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
            val_gradient(engine, model, fail_in_the_model, loss)
        elif stage == "validation loss":
            val_gradient(engine, model, lambda: model(inputs), fail)
        elif stage == "extra" and name != "head":  # that engine has no extra pass
            engine.jvp(fail_in_the_model, direction)
        else:
            finish = engine.jvp(lambda: model(inputs), direction)
            try:
                fail()
            finally:
                finish.close()

    with pytest.raises(error, match="own words"):
        run()
    assert contents(model) == before
    assert [id(tensor) for _, tensor in slots(model)] == identities


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_recorded_before_the_extra_pass_stays_valid(name):
    model, inputs = CASES["mlp"].build()
    engine = build_engine(name, model, lambda: model(inputs))
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    earlier = model(inputs).square().sum()
    measure(engine, lambda: model(inputs), any_direction(engine))
    found = torch.autograd.grad(earlier, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_random_state_is_restored_after_an_exception():
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def draw_and_fail() -> None:
        with untouched_generators():
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


def test_generators_of_every_device_are_seeded_and_restored(monkeypatch):
    devices = (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    before = [generator.get_state() for generator in devices]
    with untouched_generators(5):
        drawn = {torch.rand(1, generator=g).item() for g in (torch.default_generator, *devices)}
    assert len(drawn) == 1
    assert all(g.get_state().equal(state) for g, state in zip(devices, before, strict=True))


@pytest.mark.parametrize(("name", "passes"), [("forward_mode", 1), ("head", 0)])
def test_extra_passes_are_few(name, passes):
    model, inputs = CASES["mlp"].build()
    calls = []

    def run() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return model(inputs)

    engine = make_engine(name, model, run)
    direction = any_direction(engine)
    for _ in range(2):
        calls.clear()
        engine.jvp(run, direction).close()
        assert calls == passes * [False]


def test_finite_differences_look_at_a_model_once():
    model, inputs = CASES["mlp"].build()
    calls = []

    def run() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return model(inputs)

    engine = make_engine("finite_difference", model)
    direction = any_direction(engine)
    engine.jvp(run, direction)
    # Two passes are compared; then one that looks ahead and one behind for each of two layers.
    assert calls == [True, False, *4 * [False], False]
    calls.clear()
    engine.jvp(run, direction)
    assert calls == [False]


def test_state_is_kept_by_as_many_copies_whatever_the_number_of_buffers():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "copy" in str(func) or "clone" in str(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 9):
        model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
        with Copies() as copies, untouched(model):
            model(torch.randn(8, 4))
        counts.append(copies.count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_leave_the_mode_to_their_caller(name):
    model, inputs = CASES["mlp"].build()
    modes = []
    model.register_forward_hook(lambda *_: modes.append((model.training, model[1].training)))
    engine = make_engine(name, model, lambda: model(inputs))
    model.train = None  # LoRA merges its weights there
    for mode in (False, True):
        model.training, model[1].training = mode, not mode
        modes.clear()
        gradient = engine.gradient(lambda: model(inputs), loss)
        measure(engine, lambda: model(inputs), descent_direction(gradient))
        assert set(modes) == {(mode, not mode)}
        assert (model.training, model[1].training) == (mode, not mode)


@pytest.mark.parametrize("name", ENGINES)
def test_a_buffer_whose_entries_share_memory_is_left_alone(name):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, CLASSES)), torch.randn(6, 5)
    model.register_buffer("prior", torch.tensor(-1.1).expand(CLASSES))

    def forward() -> Tensor:
        return model[0](inputs) if name == "head" else model[0](inputs) + model.prior

    engine = make_engine(name, model, forward)
    gradient = val_gradient(engine, model, forward, loss)
    measure(engine, forward, descent_direction(gradient))
    assert model.prior.tolist() == pytest.approx([-1.1] * CLASSES)


class Remembering(nn.Module):
    """A forward that counts, stores, appends and grows a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.calls, self.seen, self.last = 0, [1], {"a": torch.ones(1)}
        self.nested = {"kept": ([], self.seen)}
        self.register_buffer("grown", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(inputs)
        self.nested["kept"][0].append(inputs)
        self.last["a"] = self.new = inputs
        self.grown.resize_(len(self.grown) + 1).fill_(self.calls)
        return self.layer(inputs)


def test_what_a_forward_remembers_is_forgotten():
    model = Remembering()
    seen, last, kept = model.seen, model.last, dict(model.last)
    with untouched(model), extra_pass(model):
        model(torch.randn(6, 5))
        assert model.calls == 1
    assert model.calls == 0
    assert model.seen is seen
    assert seen == [1]
    assert model.last is last
    assert last == kept
    assert model.nested == {"kept": ([], seen)}
    assert not hasattr(model, "new")
    assert model.grown.tolist() == [0]


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_a_training_forward_is_remembered_once(name):
    model, inputs = Remembering(), torch.randn(6, 5)
    engine = make_engine(name, model)
    measure(engine, lambda: model(inputs), any_direction(engine))
    assert (model.calls, len(model.seen), model.grown.tolist()) == (1, 2, [1, 1])


@pytest.mark.parametrize("place", ["layer.weight", "centre"])
def test_a_pass_that_writes_in_a_parameter_or_an_attribute_is_refused(place):
    model = Remembering()
    model.centre = torch.zeros(3)
    with (
        pytest.raises(UnsupportedModelError, match=f"wrote in `{place}` in place"),
        extra_pass(model),
        torch.no_grad(),
    ):
        (model.layer.weight if place == "layer.weight" else model.centre).add_(1)


def test_the_cache_of_parametrizations_is_that_of_the_caller():
    model, inputs = make_weight_norm(), torch.randn(6, 5)
    engine = make_engine("forward_mode", model)
    with nn.utils.parametrize.cached():
        expected = model[0].weight
        measure(engine, lambda: model(inputs), any_direction(engine))
        assert model[0].weight is expected


def test_a_forward_that_writes_in_its_inputs_is_refused():
    inputs = {"x": [torch.ones(2), "no tensor"], "y": torch.ones(3)}
    assert unwritten(lambda: inputs["y"] + 1, inputs)().tolist() == [2, 2, 2]
    with pytest.raises(UnsupportedModelError, match=r"in place(.|\n)*engine='head'"):
        unwritten(lambda: inputs["x"][0].sub_(1), inputs)()


def test_inputs_of_inference_mode_have_no_versions_to_compare():
    with torch.inference_mode():
        inputs = torch.ones(2)
    assert unwritten(lambda: inputs + 1, inputs)().tolist() == [2, 2]
