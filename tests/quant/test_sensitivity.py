"""Sensitivities: errors and traces by hand, and one layer quantized at a time against a network converted so."""

import pytest
import torch
from torch import nn

from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Choices
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import quant_layers
from research.quant.passes import passes
from research.quant.recipe import Recipe
from research.quant.sensitivity import (
    candidates,
    filled,
    hessian_sensitivities,
    perturbation_sensitivities,
    weight_errors,
    with_quantizers,
    without_quantizers,
)

NARROW, WIDE = LayerBits(2, 2), LayerBits(4, 4)
CHOICES: Choices = {"0": [NARROW, WIDE], "2": [NARROW, WIDE], "4": [LayerBits(8, 8)]}


def setting(quantizer: str = "lsq"):
    """A float net, which quantizer each slot gets, images, and candidates."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    slot = {"name": quantizer, "bits": 4, "init": "mse"}
    base = convert(net, Recipe(weight=slot, input=slot), "0", "4")
    x = torch.randn(8, 2, 6, 6)
    latent = without_quantizers(net)
    nets = candidates(latent, base, CHOICES)
    for net in nets.values():
        calibrate(net, [x])
    return latent, base, x, nets


def test_a_float_copy_and_candidates():
    latent, _, x, nets = setting()
    assert Allocation.of(latent) == Allocation(dict.fromkeys(("0", "2", "4"), (32, 32)))
    assert Allocation.of(nets[NARROW]) == Allocation({"0": NARROW, "2": NARROW, "4": (8, 8)})
    assert Allocation.of(nets[LayerBits(8, 8)]) == Allocation({"0": NARROW, "2": NARROW, "4": (8, 8)})
    with torch.no_grad(), passes(nets[WIDE], mode="identity"):
        torch.testing.assert_close(nets[WIDE](x), latent(x))
    assert torch.equal(nets[WIDE][0].weight, latent[0].weight)


def test_output_quantizers_of_the_recipe_are_filled_too():
    latent, base, _, _ = setting()
    output = {name: {**slots, "output": base["0"]["input"]} for name, slots in base.items()}
    net = with_quantizers(latent, output)
    assert all(layer.output_quantizer is not None for _, layer in quant_layers(net))


def test_filled_layers_are_those_of_the_candidates():
    latent, _, x, nets = setting()
    with torch.no_grad():
        before = latent(x)
        with filled(latent, nets, {"0": NARROW, "2": NARROW, "4": LayerBits(8, 8)}):
            assert torch.equal(latent(x), nets[NARROW](x))
        assert torch.equal(latent(x), before)


def test_errors_of_the_weights():
    _, _, _, nets = setting()
    errors = weight_errors(nets, CHOICES)
    layer = nets[NARROW][2]
    expected = (layer.weight_quantizer(layer.weight) - layer.weight).square().sum().detach()
    assert errors["2"][NARROW] == pytest.approx(float(expected)) and errors["2"].keys() == {NARROW, WIDE}
    assert all(errors[name][NARROW] > errors[name][WIDE] > 0 for name in ("0", "2"))


def test_the_mean_trace_times_the_error():
    found = hessian_sensitivities({"a": 6.0, "b": -1.0}, {"a": 3, "b": 5}, {"a": {NARROW: 0.5}, "b": {NARROW: 2.0}})
    assert found == {"a": {NARROW: 1.0}, "b": {NARROW: 0.0}}


@pytest.mark.parametrize("quantizer", ["lsq", "dorefa"])
@pytest.mark.parametrize("elsewhere", ["float", "widest"])
def test_the_rise_of_one_layer(elsewhere, quantizer):
    latent, _, x, nets = setting(quantizer)

    def loss(net: nn.Module) -> float:
        return float(net(x).square().mean())

    found = perturbation_sensitivities(latent, nets, CHOICES, loss, elsewhere)
    assert found["4"] == {LayerBits(8, 8): 0.0}
    others = {} if elsewhere == "float" else {"0": WIDE, "2": WIDE, "4": LayerBits(8, 8)}
    with torch.no_grad():
        with filled(latent, nets, others):
            reference = loss(latent)
        for bits in (NARROW, WIDE):
            with filled(latent, nets, {**others, "2": bits}):
                assert found["2"][bits] == pytest.approx(loss(latent) - reference, abs=1e-9)
    assert (found["2"][WIDE] == 0) == (elsewhere == "widest") and found["2"][NARROW] != 0


def test_what_is_refused():
    latent, base, x, nets = setting()
    with pytest.raises(ValueError, match="elsewhere=best: use one of float, widest"):
        perturbation_sensitivities(latent, nets, CHOICES, lambda net: 0.0, "best")
    with pytest.raises(
        ValueError, match=r"^allocation\.0: quantizer\.weight\.bits=1: lsq of a weight needs at least 2"
    ):
        candidates(latent, base, {**CHOICES, "0": [LayerBits(1, 1)]})
