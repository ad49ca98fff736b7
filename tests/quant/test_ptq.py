"""Post-training quantization of weights against its formula, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from research.quant.convert import convert
from research.quant.layers import quant_layers, quantized_weights, quantizers
from research.quant.ptq import quantized_copy
from research.quant.recipe import Recipe


def float_net(recipe: dict[str, object] | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    convert(net, Recipe.from_config(recipe), first="0", last="4")
    return net.eval()


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.clamp(torch.round(weight / scale), -top, top) * scale


@pytest.mark.parametrize("bits", range(2, 9))
def test_min_max_is_the_formula_and_clips_nothing(bits: int) -> None:
    net = float_net()
    found = quantized_weights(quantized_copy(net, bits))
    assert list(found) == ["0", "4"]
    for name, layer in quant_layers(net):
        scale = layer.weight.detach().abs().max() / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(found[name], rounded(layer.weight.detach(), scale, bits), rtol=1e-6, atol=0)
        assert float((found[name] - layer.weight.detach()).abs().max() / scale) <= 0.5 + 1e-5
        assert len(found[name].unique()) <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_other_range_has_less_squared_error(bits: int) -> None:
    net = float_net()
    wide, narrow = (quantized_weights(quantized_copy(net, bits, init)) for init in ("minmax", "mse"))
    for name, layer in quant_layers(net):
        errors = [float((found[name] - layer.weight).square().sum().detach()) for found in (wide, narrow)]
        assert errors[1] < errors[0]
        top = 2 ** (bits - 1) - 1
        scale = narrow[name].abs().max() / top
        torch.testing.assert_close(narrow[name], rounded(layer.weight.detach(), scale, bits), rtol=1e-5, atol=1e-7)


def test_only_weights_are_quantized_and_the_network_stays_as_it_is() -> None:
    net, x = float_net(), torch.randn(2, 3, 4, 4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    output = net(x)
    quantized = quantized_copy(net, 3)
    assert {name for name, _ in quantizers(quantized)} == {"0.weight_quantizer", "4.weight_quantizer"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(x), output) and not torch.equal(quantized(x), output)
    by_hand = float_net()
    with torch.no_grad():
        for name, layer in quant_layers(by_hand):
            layer.weight.copy_(quantized_weights(quantized)[name])
    assert torch.equal(quantized(x), by_hand(x))


def test_what_is_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"ptq={bits}: use widths from 2 to 8"):
            quantized_copy(float_net(), bits)
    with pytest.raises(ValueError, match="ptq_range=lsq: use one of minmax, mse"):
        quantized_copy(float_net(), 4, "lsq")
    lsq = float_net({"input": {"name": "lsq", "bits": 4}})
    with pytest.raises(
        ValueError, match=r"0\.input_quantizer quantizes this network already; use a run with quantizer"
    ):
        quantized_copy(lsq, 4)
