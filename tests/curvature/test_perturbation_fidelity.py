"""Diminishment and mismatch, on weights whose codes and clips are known."""

import pytest
import torch
from torch import Tensor, nn

from research.curvature.perturbation_fidelity import (
    cosine,
    cosines,
    flipped_fraction,
    flipped_fractions,
    weight_gradients,
)
from research.quant.convert import convert
from research.quant.layers import quant_layers
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.recipe import Recipe


def net_with_clip(clip: float) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    weight = {"name": "liq", "bits": 4, "options": {"clip": clip}}
    convert(net, Recipe.from_config({"weight": weight}), "0", "2")
    return net.double()


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.arange(4) % 3) for _ in range(2)]


def test_the_flipped_fraction_counts_codes() -> None:
    quantizer = build_quantizer(QuantizerSpec("lsq", 4), (4,), 0, "weight").double()
    weight = torch.tensor([0.1, 0.4, 1.4, 100.0], dtype=torch.float64)
    for move, expected in ((0.0, 0.0), (0.05, 0.0), (0.2, 0.5), (-0.95, 0.75)):
        assert flipped_fraction(quantizer, weight, torch.full_like(weight, move)) == expected


def test_the_cosine_is_that_of_the_angle() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert cosine(one, other) == pytest.approx(0.5**0.5)
    assert cosine(one, -3 * one) == pytest.approx(-1)
    assert cosine(one, 0 * one) == 0


def test_gradients_agree_exactly_as_far_as_nothing_is_clipped() -> None:
    inside = cosines(*weight_gradients(net_with_clip(10.0), loss, batches()))
    assert inside == pytest.approx({"0": 1.0, "2": 1.0})
    net = net_with_clip(0.2)
    latent, quantized = weight_gradients(net, loss, batches())
    for name, value in cosines(latent, quantized).items():
        kept = net.get_submodule(name).weight.abs() <= 0.2
        torch.testing.assert_close(latent[name], quantized[name] * kept)
        assert value == pytest.approx(float(latent[name].norm() / quantized[name].norm()))
        assert value < 0.99


def test_frozen_layers_are_left_out() -> None:
    whole = weight_gradients(net_with_clip(0.2), loss, batches())
    net = net_with_clip(0.2)
    net[0].weight.requires_grad_(False)
    for found, expected in zip(weight_gradients(net, loss, batches()), whole, strict=True):
        assert list(found) == ["2"]
        torch.testing.assert_close(found["2"], expected["2"])


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    net = net_with_clip(0.5)
    latent, _ = weight_gradients(net, loss, batches())
    joined = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    whole, _ = weight_gradients(net, loss, [joined])
    for name, gradient in latent.items():
        torch.testing.assert_close(gradient, whole[name])
    assert net.training and all(layer.weight_offset is None for _, layer in quant_layers(net))


def test_small_perturbations_flip_nothing_and_large_ones_flip_more() -> None:
    net = net_with_clip(0.5)
    latent, _ = weight_gradients(net, loss, batches())
    flips = [
        flipped_fractions(net, {name: factor * gradient / gradient.norm() for name, gradient in latent.items()})
        for factor in (1e-9, 0.1, 1.0)
    ]
    assert flips[0] == {"0": 0.0, "2": 0.0}
    assert all(flips[0][name] < flips[1][name] < flips[2][name] <= 1 for name in latent)


def test_layers_without_a_weight_quantizer_have_nothing_to_flip() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    rules = [{"match": "@first", "weight": {"bits": 32}}]
    convert(net, Recipe.from_config({"weight": {"name": "lsq", "bits": 4}, "rules": rules}), "0", "1")
    net.double()
    assert list(weight_gradients(net, loss, batches())[0]) == ["1"]
