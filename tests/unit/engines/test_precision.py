"""Autocast and rounded products: what is switched off for the solve, and that it comes back."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CASES, dense_tangent, double_copy, random_direction, relative_error
from helpers.models import CLASSES, HalfPrecision, make_mlp
from torch import Tensor, nn

from saflex_lightning.engines import make_engine, make_tangent
from saflex_lightning.engines.precision import exact_products, full_precision

TOLERANCE = {"finite_difference": 2e-2, "forward_mode": 2e-6}
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


class CountingMLP(nn.Module):
    """A perceptron that notes the precision of each of its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_mlp()
        self.seen: list[str] = []

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.network(inputs)
        self.seen.append(f"{scores.dtype} {torch.get_float32_matmul_precision()}")
        return scores


def full_reference(model: nn.Module, inputs: Tensor, direction: list[Tensor]) -> Tensor:
    copied = double_copy(model)
    return dense_tangent(copied(inputs.double()), list(copied.parameters()), direction)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("cache_enabled", [True, False])
def test_under_autocast_the_tangent_has_full_precision(name, cache_enabled):
    model, inputs = CASES["cnn, batch norm, train"].build()
    direction = random_direction(list(model.parameters()))
    expected = full_reference(model, inputs, direction)
    engine = make_engine(name, model)
    with torch.autocast(**AUTOCAST, cache_enabled=cache_enabled):
        model(inputs)  # fills the cache of cast weights
        scores, found = engine.measure(
            lambda: model(inputs), make_tangent([-part for part in direction])
        )
        loss = F.cross_entropy(scores, torch.arange(6) % CLASSES)
    assert scores.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= TOLERANCE[name]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_the_model_is_switched_off_too(name, outside):
    torch.manual_seed(0)
    model, inputs = HalfPrecision(), torch.randn(6, 5)
    direction = random_direction(list(model.parameters()))
    plain = nn.Sequential(model.body, nn.Tanh(), model.head)
    expected = full_reference(plain, inputs, direction)
    engine = make_engine(name, model)
    with torch.autocast(**AUTOCAST, enabled=outside):
        scores, found = engine.measure(
            lambda: model(inputs), make_tangent([-part for part in direction])
        )
    assert relative_error(found, expected) <= TOLERANCE[name]
    # The training forward kept its own precision.
    assert relative_error(scores.detach(), plain(inputs).detach().double()) > 1e-4


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_gradient_has_full_precision_under_autocast(name):
    torch.manual_seed(0)
    model, inputs, target = HalfPrecision(), torch.randn(6, 5), torch.arange(6) % CLASSES
    engine = make_engine(name, model)
    with torch.autocast(**AUTOCAST):
        found = engine.gradient(
            lambda: model(inputs), lambda scores: F.cross_entropy(scores, target)
        )
    plain = nn.Sequential(model.body, nn.Tanh(), model.head)
    loss = F.cross_entropy(plain(inputs), target)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(list(found), list(expected))


def test_a_second_extra_pass_is_taken_only_where_the_forward_rounds():
    model, inputs = CountingMLP(), torch.randn(6, 5)
    engine = make_engine("finite_difference", model)
    tangent = make_tangent(random_direction(engine.params))
    engine.measure(lambda: model(inputs), tangent)
    assert model.seen == 3 * ["torch.float32 highest"]  # one pass more to check itself
    model.seen.clear()
    engine.measure(lambda: model(inputs), tangent)
    assert model.seen == 2 * ["torch.float32 highest"]
    model.seen.clear()
    with torch.autocast(**AUTOCAST):
        engine.measure(lambda: model(inputs), tangent)
        # The first time one pass more, to see that two of them agree.
        assert model.seen == 3 * ["torch.float32 highest"] + ["torch.bfloat16 highest"]
        model.seen.clear()
        engine.measure(lambda: model(inputs), tangent)
    assert model.seen == 2 * ["torch.float32 highest"] + ["torch.bfloat16 highest"]
    model.seen.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        engine.measure(lambda: model(inputs), tangent)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert model.seen == 2 * ["torch.float32 highest"] + ["torch.float32 medium"]


def test_full_precision_restores_autocast_when_the_block_fails():
    switch, names = torch.set_autocast_enabled, []

    def fail() -> None:
        with full_precision([torch.zeros(1)]) as ignored:
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
    with full_precision([torch.zeros(1)]) as ignored, torch.autocast(**AUTOCAST, enabled=False):
        pass
    assert ignored == []


def products() -> list:
    backends = torch.backends
    return [
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
    ]


def test_convolutions_on_cuda_are_not_rounded_to_tf32():
    # The switches exist without a device; True is torch's default.
    before = products()
    assert before[-1] is True
    with exact_products("cuda") as switched:
        assert switched
        assert products() == ["highest", False, False]
    assert products() == before


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_rounded_matrix_products_come_back_after_an_exception(device_type):
    def fail() -> None:
        with exact_products(device_type) as switched:
            assert "high" in switched
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyboardInterrupt

    torch.set_float32_matmul_precision("high")
    try:
        before = products()
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert products() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "conv"), reason="torch has the newer switches from 2.9 on"
)
def test_the_newer_switches_are_seen_where_the_older_cannot_be_read():
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "bf16"
    try:
        with exact_products("cpu") as switched:
            assert conv.fp32_precision == "ieee"
        assert switched == ["bf16"]
        assert conv.fp32_precision == "bf16"
    finally:
        conv.fp32_precision = before


def test_other_devices_have_no_switches():
    with exact_products("mps") as switched:
        assert switched == []
