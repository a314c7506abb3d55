"""Autocast and rounded products: what is switched off for the solve, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CASES, dense_tangent, double_copy, random_direction, relative_error
from helpers.models import CLASSES, HalfPrecision, make_mlp
from helpers.solving import measure, val_gradient
from torch import Tensor, nn

from saflex_lightning.engines import UnsupportedModelError, descent_direction, make_engine
from saflex_lightning.engines.finite_difference import _rounded_products
from saflex_lightning.engines.untouched import full_precision

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}
TARGET = torch.arange(6) % CLASSES


def full_reference(model: nn.Module, inputs: Tensor, params, direction: list[Tensor]) -> Tensor:
    copied = double_copy(model)
    twins = dict(zip(model.parameters(), copied.parameters(), strict=True))
    return dense_tangent(copied(inputs.double()), [twins[p] for p in params], direction)


def make_half() -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model that opens autocast itself, the same without, and inputs."""
    torch.manual_seed(0)
    model = HalfPrecision()
    return model, nn.Sequential(model.body, nn.Tanh(), model.head), torch.randn(6, 5)


# Autocast


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_forward_mode_has_full_precision_under_autocast(cache_enabled):
    model, inputs = CASES["cnn, batch norm, train"].build()
    engine = make_engine("forward_mode", model)
    direction = random_direction(engine.params)
    expected = full_reference(model, inputs, engine.params, direction)
    with torch.autocast(**AUTOCAST, cache_enabled=cache_enabled):
        model(inputs)  # fills the cache of cast weights
        along = descent_direction([-part for part in direction])
        scores, found = measure(engine, lambda: model(inputs), along)
        loss = F.cross_entropy(scores, TARGET)
    assert scores.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 2e-6
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_the_model_is_switched_off_too(outside):
    model, plain, inputs = make_half()
    engine = make_engine("forward_mode", model)
    direction = random_direction(engine.params)
    expected = full_reference(plain, inputs, engine.params, direction)
    with torch.autocast(**AUTOCAST, enabled=outside):
        along = descent_direction([-part for part in direction])
        scores, found = measure(engine, lambda: model(inputs), along)
    assert relative_error(found, expected) <= 2e-6
    # The training forward kept its own precision.
    assert relative_error(scores.detach(), plain(inputs).detach().double()) > 1e-4


def test_the_head_s_derivative_is_of_the_features_that_the_training_forward_has():
    model, inputs = CASES["cnn, batch norm, train"].build()
    engine = make_engine("head", model, lambda: model(inputs))
    direction = random_direction(engine.params)
    expected = full_reference(model, inputs, engine.params, direction)
    with torch.autocast(**AUTOCAST):
        along = descent_direction([-part for part in direction])
        scores, found = measure(engine, lambda: model(inputs), along)
    assert scores.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 2e-2


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode", "head"])
def test_the_gradient_has_full_precision_under_autocast(name):
    model, plain, inputs = make_half()
    engine = make_engine(name, model, lambda: model(inputs))
    with torch.autocast(**AUTOCAST):
        found = val_gradient(
            engine, model, lambda: model(inputs), lambda scores: F.cross_entropy(scores, TARGET)
        )
    expected = torch.autograd.grad(F.cross_entropy(plain(inputs), TARGET), engine.params)
    torch.testing.assert_close(list(found), list(expected))


# What finite differences refuse


@pytest.mark.parametrize(
    ("inside", "outside", "named"),
    [
        (False, True, "autocast rounds it"),
        (True, False, "autocast inside the model rounds it"),
        (True, True, "autocast rounds it"),
    ],
)
def test_finite_differences_refuse_autocast(inside, outside, named):
    half, plain, inputs = make_half()
    model = half if inside else plain
    engine = make_engine("finite_difference", model)
    direction = descent_direction(random_direction(engine.params))
    with torch.autocast(**AUTOCAST, enabled=outside):
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=f"{named}.*engine='forward_mode'"):
                engine.jvp(lambda: model(inputs), direction)
        assert torch.is_autocast_enabled("cpu") == outside
        model(inputs).sum().backward()
    measure(engine, lambda: plain(inputs), direction)  # where nothing rounds it is served


def test_autocast_that_comes_later_is_refused_too():
    _, plain, inputs = make_half()
    engine = make_engine("finite_difference", plain)
    direction = descent_direction(random_direction(engine.params))
    measure(engine, lambda: plain(inputs), direction)
    with (
        torch.autocast(**AUTOCAST),
        pytest.raises(UnsupportedModelError, match="autocast rounds it"),
    ):
        engine.jvp(lambda: plain(inputs), direction)


@pytest.fixture
def products():
    """The switches of rounded products, which come back after the test."""
    backends, before = torch.backends, torch.get_float32_matmul_precision()
    yield backends
    torch.set_float32_matmul_precision(before)
    backends.cudnn.allow_tf32 = True
    backends.cuda.matmul.allow_tf32 = False


NEWER = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "conv"), reason="torch has the newer switches from 2.9 on"
)


@NEWER
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_finite_differences_refuse_rounded_products(precision, products):
    model, inputs = make_mlp(), torch.randn(6, 5)
    engine = make_engine("finite_difference", model)
    direction = descent_direction(random_direction(engine.params))
    torch.set_float32_matmul_precision(precision)
    name = r"torch\.backends\.mkldnn\.matmul\.fp32_precision rounds them"
    with pytest.raises(UnsupportedModelError, match=f"{name}.*engine='forward_mode'"):
        engine.jvp(lambda: model(inputs), direction)
    assert torch.get_float32_matmul_precision() == precision
    torch.set_float32_matmul_precision("highest")
    measure(engine, lambda: model(inputs), direction)


def test_convolutions_on_cuda_are_rounded_unless_they_are_told_not_to(products):
    # The switches exist without a device; True is torch's default.
    assert _rounded_products("cuda") == "torch.backends.cudnn.allow_tf32"
    products.cudnn.allow_tf32 = False
    assert _rounded_products("cuda") is None
    products.cuda.matmul.allow_tf32 = True
    assert _rounded_products("cuda") == "torch.backends.cuda.matmul.allow_tf32"


@NEWER
def test_the_newer_switches_are_seen():
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "bf16"
    try:
        assert _rounded_products("cpu") == "torch.backends.mkldnn.conv.fp32_precision"
    finally:
        conv.fp32_precision = before
    assert _rounded_products("cpu") is None


def test_other_devices_have_no_switches():
    assert _rounded_products("mps") is None


# The block without autocast


def test_full_precision_restores_autocast_when_the_block_fails():
    switch, names = torch.set_autocast_enabled, []

    def fail() -> None:
        with full_precision("cpu") as ignored:
            assert not torch.is_autocast_enabled("cpu")
            with torch.autocast(**AUTOCAST):
                assert not torch.is_autocast_enabled("cpu")
            names.extend(ignored)
            raise KeyboardInterrupt

    with torch.autocast(**AUTOCAST):
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert torch.is_autocast_enabled("cpu")
        assert torch.set_autocast_enabled is switch
    assert names == ["autocast", "autocast inside the model"]


def test_full_precision_has_nothing_to_switch_off_without_autocast():
    with full_precision("cpu") as ignored, torch.autocast(**AUTOCAST, enabled=False):
        pass
    assert ignored == []
