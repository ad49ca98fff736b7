"""Slices of the loss: exact on quadratics; directions, centre and sites on a small quantized network."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from research.curvature.landscape import (
    filter_normalised_directions,
    landscape,
    positions,
)
from research.curvature.sharpness import mean_loss
from research.deploy.deployed import deployed
from research.quant.layers import QuantLinear, quantized_weights
from research.quant.passes import evaluating
from tests.curvature.test_sharpness import crossentropy, images, quantized_net, squares


@pytest.mark.parametrize("dimensions", [1, 2])
def test_slices_of_a_quadratic(dimensions: int) -> None:
    """``L = |W - T|^2 / 2n`` on unit vectors, at every point of the slice."""
    torch.manual_seed(0)
    net = QuantLinear(nn.Linear(5, 3, bias=False)).double()
    batch = torch.eye(5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    directions = filter_normalised_directions(net, dimensions, seed=4)
    along = positions(2.0, 5)
    found = landscape(net, squares, [batch], directions, along)
    assert found.shape == (5,) * dimensions and found.dtype == torch.float64
    weight, axes = net.weight.detach(), [direction["weight"] for direction in directions]
    for place in torch.cartesian_prod(*[torch.arange(5)] * dimensions).reshape(-1, dimensions).tolist():
        moved = weight + sum(along[index] * axis for index, axis in zip(place, axes, strict=True))
        assert found[tuple(place)].item() == pytest.approx(float((moved.T - batch[1]).square().sum() / 10), rel=1e-12)


@pytest.mark.parametrize("site", ["quantized", "latent"])
def test_every_filter_has_the_norm_of_what_it_displaces(site: Any) -> None:
    net = quantized_net()
    weights = quantized_weights(net) if site == "quantized" else {n: net[int(n)].weight.detach() for n in "05"}
    one, other = filter_normalised_directions(net, 2, site=site)
    assert one.keys() == {"0.weight", "5.weight"}, "biases and norm parameters stay where they are"
    for name, weight in weights.items():
        for direction in (one, other):
            torch.testing.assert_close(
                direction[f"{name}.weight"].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
            )
        assert not torch.allclose(one[f"{name}.weight"], other[f"{name}.weight"])


def test_biases_and_norms_are_displaced_where_asked() -> None:
    net = quantized_net()
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    (direction,) = filter_normalised_directions(net, 1, kinds=("weight", "bias", "norm_weight", "norm_bias"))
    assert direction.keys() == {"0.weight", "5.weight", "1.weight", "1.bias", "5.bias"}
    assert direction["1.bias"].norm() == pytest.approx(1.0), "a vector is one filter: the norm of four times 0.5"


def test_the_centre_is_the_network_and_the_network_stays() -> None:
    net, batches = quantized_net(), [images()]
    before = copy.deepcopy(net.state_dict())
    for site in ("quantized", "latent"):
        found = landscape(net, crossentropy, batches, filter_normalised_directions(net, 2, site=site), [0.0, 0.5], site)
        with evaluating(net):
            assert found[0, 0].item() == mean_loss(net, crossentropy, batches)
        assert len(found.unique()) == 4
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_latent_weights_stand_on_a_staircase() -> None:
    net, along = quantized_net(), positions(1e-6, 3)
    for site, steps in (("latent", 1), ("quantized", 3)):
        directions = filter_normalised_directions(net, 1, site=site)
        assert len(landscape(net, crossentropy, [images()], directions, along, site).unique()) == steps


def test_networks_of_one_shape_share_their_directions() -> None:
    net, other = quantized_net(), quantized_net()
    with torch.no_grad():
        for layer in (other[0], other[5]):
            layer.weight *= -1.7
    (one,), (two,) = (filter_normalised_directions(n, 1, seed=2, site="latent") for n in (net, other))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], 1.7 * tensor)


def test_positions_have_the_network_in_their_middle() -> None:
    assert positions(1.0, 5) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    along = positions(0.3, 21)
    assert along[10] == 0 and along == [-x for x in reversed(along)]


def test_options_out_of_range() -> None:
    net = quantized_net()
    with pytest.raises(ValueError, match="dimensions=3: use 1 or 2"):
        filter_normalised_directions(net, 3)
    with pytest.raises(ValueError, match="points=20: use an odd number from 3"):
        positions(1.0, 20)
    with pytest.raises(ValueError, match="span=0: use a positive number"):
        positions(0.0, 21)
    with pytest.raises(ValueError, match="site=latent: the codes of 0 do not follow its latent weight"):
        filter_normalised_directions(deployed(net), 1, site="latent")
