"""Sharpness at a radius: exact on quadratics, and on a small quantized network against the same thing by hand."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.curvature.displacement import centre, displaced, gradient_at, random_direction
from research.curvature.radius import NORMS, Ball, average_case, filter_norms, worst_case
from research.curvature.sharpness import saq_sharpness
from research.learning.perturbation import asam_perturbation, joint_norm
from research.quant.layers import QuantLinear, quant_layers, quantized_weights
from tests.curvature.test_sharpness import crossentropy, images, quantized_net, squares

ETA = 0.01


def parabola(rows: int = 6) -> tuple[QuantLinear, tuple[Tensor, Tensor]]:
    """Two weights, and inputs under which the squared error is a quadratic form with two different curvatures."""
    torch.manual_seed(0)
    net = QuantLinear(nn.Linear(2, 1, bias=False)).double()
    inputs = torch.randn(rows, 2, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    return net, (inputs, torch.randn(rows, 1, dtype=torch.float64))


def factor(weight: Tensor, norm: str) -> Tensor:
    """T of the module's table, written down once more."""
    if norm == "adaptive":
        return weight.abs() + ETA
    return torch.ones_like(weight) if norm == "plain" else weight.norm() * torch.ones_like(weight)


@pytest.mark.parametrize("norm", NORMS)
def test_the_worst_point_of_a_parabola(norm: Any) -> None:
    """The greatest value over a ring of 200,000 points, the boundary of the ball (the function is convex)."""
    net, (inputs, targets) = parabola()
    weight, rho = net.weight.detach(), 0.7
    angles = torch.linspace(0, 2 * torch.pi, 200_001, dtype=torch.float64)
    ring = weight + factor(weight, norm) * rho * torch.stack([angles.cos(), angles.sin()], 1)
    greatest = (0.5 * (ring @ inputs.T - targets.T).square().mean(1)).max()
    found = worst_case(net, squares, [(inputs, targets)], rho, norm, steps=60, eta=ETA)
    assert found.clean == pytest.approx(squares(net, (inputs, targets)).item(), rel=1e-12)
    assert found.perturbed == pytest.approx(greatest.item(), rel=1e-6)
    few = worst_case(net, squares, [(inputs, targets)], rho, norm, steps=1, eta=ETA)
    assert found.clean < few.perturbed <= found.perturbed * (1 + 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_the_average_over_a_sphere(norm: Any) -> None:
    """At the minimum of ``|W - T|^2 / 2n`` every displacement ``e`` costs ``|e|^2 / 2n``."""
    torch.manual_seed(1)
    net, rho = QuantLinear(nn.Linear(5, 3, bias=False)).double(), 0.3
    batch = torch.eye(5, dtype=torch.float64), net.weight.T.detach()
    found = average_case(net, squares, [batch], rho, norm, directions=100, eta=ETA)
    assert found.clean == pytest.approx(0, abs=1e-30) and len(found.losses) == 100
    weight = net.weight.detach()
    sizes = {"plain": 1.0, "relative": weight.norm(), "filter": weight.norm(), "adaptive": factor(weight, norm)}
    expected = float(torch.as_tensor(sizes[norm]).square().mean()) * rho**2 / 10
    if norm == "adaptive":
        assert 0 < found.standard_error < 0.1 * expected
        assert found.rise == pytest.approx(expected, abs=4 * found.standard_error)
        assert found.worst > found.rise
    else:
        assert found.losses == pytest.approx([expected] * 100, rel=1e-9)
        assert found.rise == pytest.approx(found.worst, rel=1e-9) and found.standard_error < 1e-9


def test_one_step_is_the_sharpness_that_saq_reports() -> None:
    expected = saq_sharpness(quantized_net(), crossentropy, [images()], 0.5, kinds=("weight",))
    found = worst_case(quantized_net(), crossentropy, [images()], 0.5, steps=1)
    assert found.clean == pytest.approx(expected.clean, rel=1e-12)
    assert found.perturbed == pytest.approx(expected.perturbed, rel=1e-10)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-10)


@pytest.mark.parametrize("kinds", [("weight",), ("weight", "bias", "norm_weight", "norm_bias")])
def test_one_adaptive_step_is_the_point_of_asam(kinds: Any) -> None:
    net, rho = quantized_net(), 0.4
    points = centre(net, "quantized", kinds)
    zeros = {name: torch.zeros_like(point) for name, point in points.items()}
    _, gradients = gradient_at(net, crossentropy, [images()], "quantized", zeros)
    with displaced(net, "quantized", asam_perturbation(gradients, points, rho, ETA)) as network:
        expected = crossentropy(network, images()).item()
    found = worst_case(net, crossentropy, [images()], rho, "adaptive", steps=1, kinds=kinds, eta=ETA)
    assert found.perturbed == pytest.approx(expected, rel=1e-10)
    assert len(points) == (2 if kinds == ("weight",) else 5)


def test_more_steps_find_worse_points() -> None:
    one, ten = (worst_case(quantized_net(), crossentropy, [images()], 2.0, steps=steps) for steps in (1, 10))
    assert ten.perturbed > one.perturbed > one.clean == ten.clean
    nowhere = worst_case(quantized_net(), crossentropy, [images()], 0.0, steps=3)
    assert nowhere.rise == 0


@pytest.mark.parametrize("norm", NORMS)
def test_displacements_lie_on_the_boundary(norm: Any) -> None:
    points = centre(quantized_net(), "quantized", ("weight", "bias"))
    ball, direction = Ball.around(points, norm, ETA), random_direction(points, 0, 0)
    units = ball.unit(direction)
    moves = ball.moves(units, 0.3)
    if norm == "filter":
        for name, point in points.items():
            torch.testing.assert_close(filter_norms(moves[name]), 0.3 * filter_norms(point))
    else:
        assert float(joint_norm(units)) == pytest.approx(1)
        size = {"plain": 1.0, "relative": float(joint_norm(points))}
        if norm in size:
            assert float(joint_norm(moves)) == pytest.approx(0.3 * size[norm])
    inside = {name: 0.2 * tensor for name, tensor in units.items()}
    for given, expected in ((inside, inside), (units, {name: 0.3 * tensor for name, tensor in units.items()})):
        found = ball.inside(given, 0.3)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-15) for name in points)


@pytest.mark.parametrize("site", ["quantized", "latent"])
def test_the_network_is_left_as_it_was(site: Any) -> None:
    net = quantized_net()
    before = copy.deepcopy(net.state_dict())
    worst_case(net, crossentropy, [images()], 0.5, steps=2, site=site)
    average_case(net, crossentropy, [images()], 0.5, directions=2, site=site)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(layer.weight_offset is None for _, layer in quant_layers(net))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_small_moves_of_latent_weights_change_nothing() -> None:
    net = quantized_net()
    for found in (
        worst_case(net, crossentropy, [images()], 1e-6, site="latent").rise,
        average_case(net, crossentropy, [images()], 1e-6, site="latent").worst,
    ):
        assert found == 0
    assert worst_case(net, crossentropy, [images()], 1e-6, site="quantized").rise > 0
    assert worst_case(net, crossentropy, [images()], 3.0, site="latent").rise > 0


def test_the_sites_have_the_centres_that_they_name() -> None:
    net = quantized_net()
    latent, quantized = (centre(net, site, ("weight", "bias")) for site in ("latent", "quantized"))
    weights = quantized_weights(net)
    assert latent.keys() == quantized.keys() == {"0.weight", "5.weight", "5.bias"}
    assert torch.equal(latent["0.weight"], net[0].weight) and torch.equal(quantized["0.weight"], weights["0"])
    assert torch.equal(latent["5.bias"], quantized["5.bias"])


@pytest.mark.parametrize("norm", NORMS)
def test_it_does_not_matter_how_the_set_is_cut(norm: Any) -> None:
    x, y = images()
    for measure in (partial(worst_case, steps=2), partial(average_case, directions=2)):
        whole = measure(quantized_net(), crossentropy, [(x, y)], 0.2, norm)
        parts = measure(quantized_net(), crossentropy, [(x[:7], y[:7]), (x[7:], y[7:])], 0.2, norm)
        assert parts.rise == pytest.approx(whole.rise, rel=1e-8)


def test_directions_depend_on_seed_index_and_name_alone() -> None:
    points = centre(quantized_net(), "quantized")
    others = {name: 3 * point for name, point in reversed(points.items())}
    first = random_direction(points, 0, 0)
    assert all(torch.equal(first[name], tensor) for name, tensor in random_direction(others, 0, 0).items())
    for seed, index in ((1, 0), (0, 1)):
        assert not torch.equal(first["0.weight"], random_direction(points, seed, index)["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho=-1: use 0 or more"),
        ({"steps": 0}, "steps=0: use 1 or more"),
        ({"norm": "box"}, "norm=box: use one of plain, relative, adaptive, filter"),
        ({"site": "codes"}, "site=codes: use one of quantized, latent"),
        ({"kinds": ("other",)}, "kinds=other: the network has no such parameters"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worst_case(quantized_net(), crossentropy, [images()], **{"rho": 0.5, **options})


def test_one_direction_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="directions=1: use 2 or more"):
        average_case(quantized_net(), crossentropy, [images()], 0.5, directions=1)
