"""The sharpness measure: exact on a quadratic, and on a small quantized network against the same thing by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.curvature.sharpness import saq_sharpness
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import QuantLinear, quant_layers, quantized_weights
from research.quant.recipe import Recipe

LIQ = {slot: {"name": "liq", "bits": 3} for slot in ("weight", "input")}


def squares(network: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return 0.5 * (network(inputs) - targets).square().sum(1).mean()


def crossentropy(network: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def images(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def quantized_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(1), nn.Linear(64, 4)
    )
    convert(net, Recipe.from_config(LIQ), "0", "5")
    net.double()
    calibrate(net, [images()[0]])
    return net


@pytest.mark.parametrize("rho", [0.0, 0.3, 2.0])
def test_a_quadratic(rho: float) -> None:
    """``L = |W - T|^2 / 2n`` on unit vectors: the rise is ``rho |g| + rho^2 / 2n`` exactly."""
    torch.manual_seed(0)
    net = QuantLinear(nn.Linear(5, 3, bias=False)).double()
    batch = torch.eye(5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = saq_sharpness(net, squares, [batch], rho)
    gradient = float((net.weight.T - batch[1]).detach().norm() / 5)
    assert found.gradient_norm == pytest.approx(gradient)
    assert found.rise == pytest.approx(rho * gradient + rho**2 / 10, rel=1e-9)


def test_a_quantized_network_by_hand_and_left_as_it_was() -> None:
    net, rho = quantized_net(), 0.5
    before = copy.deepcopy(net.state_dict())
    found = saq_sharpness(net, crossentropy, [images()], rho)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(layer.weight_offset is None for _, layer in quant_layers(net))

    by_hand = copy.deepcopy(net).eval()
    perturbed: list[Tensor] = []
    for name, layer in quant_layers(by_hand):
        weight = quantized_weights(net)[name]
        layer.weight_quantizer = None
        layer.weight.data.copy_(weight)
        perturbed.append(layer.weight)
    perturbed += [by_hand[1].weight, by_hand[1].bias, by_hand[5].bias]
    perturbed += [layer.input_quantizer.raw_clip for _, layer in quant_layers(by_hand)]
    clean = crossentropy(by_hand, images())
    gradients = torch.autograd.grad(clean, perturbed)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        for tensor, gradient in zip(perturbed, gradients, strict=True):
            tensor += rho * gradient / norm
        after = crossentropy(by_hand, images())
    assert found.clean == pytest.approx(clean.item(), rel=1e-12)
    assert found.perturbed == pytest.approx(after.item(), rel=1e-10)
    assert found.gradient_norm == pytest.approx(norm.item(), rel=1e-10)
    assert found.rise > 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_does_not_matter_how_the_set_is_cut(adaptive: bool) -> None:
    x, y = images()
    whole = saq_sharpness(quantized_net(), crossentropy, [(x, y)], 0.5, adaptive=adaptive)
    parts = saq_sharpness(quantized_net(), crossentropy, [(x[:7], y[:7]), (x[7:], y[7:])], 0.5, adaptive=adaptive)
    assert parts.rise == pytest.approx(whole.rise, rel=1e-9)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-9)


def test_the_kinds_say_what_is_perturbed() -> None:
    rises = {
        kinds: saq_sharpness(quantized_net(), crossentropy, [images()], 1e-4, kinds=kinds).rise
        for kinds in (("weight",), ("norm_bias",), ("weight", "norm_bias"))
    }
    assert len(set(rises.values())) == 3
    biases = saq_sharpness(quantized_net(), crossentropy, [images()], 1e-4, kinds=("bias",))
    assert biases.rise == pytest.approx(1e-4 * biases.gradient_norm, rel=1e-3), "the last bias is differentiable"


def test_the_adaptive_form_is_relative_to_the_weights() -> None:
    plain, adaptive = (
        saq_sharpness(quantized_net(), crossentropy, [images()], 0.5, adaptive=on) for on in (False, True)
    )
    assert plain.clean == adaptive.clean and plain.perturbed != adaptive.perturbed
    assert adaptive.rise > 0


def test_nothing_to_measure_on() -> None:
    with pytest.raises(ValueError, match="no batches"):
        saq_sharpness(quantized_net(), crossentropy, [], 0.5)
