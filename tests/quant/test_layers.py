"""The slots: their order, and what the gradient at the quantized weights is."""

import copy

import pytest
import torch
from torch import nn

from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import QuantConv2d, QuantLinear, QuantOutput, quant_layers, quantized_weights, quantizers
from research.quant.passes import weight_leaves
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.recipe import Recipe


class Log(nn.Module):
    """A slot that adds a number and writes its name down."""

    def __init__(self, name: str, log: list[str], add: float):
        super().__init__()
        self.log, self.label, self.add = log, name, add

    def forward(self, x, layer=None):
        self.log.append(self.label)
        return x + self.add


def test_order_of_the_slots():
    log: list[str] = []
    layer = QuantLinear(nn.Linear(3, 2, bias=False))
    layer.input_quantizer = Log("input", log, 1.0)
    layer.weight_quantizer = Log("weight", log, 10.0)
    layer.weight_override = Log("override", log, 100.0)
    layer.weight_offset = torch.full((2, 3), 1000.0)
    layer.output_quantizer = Log("output", log, 0.5)
    x = torch.randn(4, 3)
    expected = nn.functional.linear(x + 1, layer.weight + 1110) + 0.5
    torch.testing.assert_close(layer(x), expected)
    assert log == ["input", "weight", "override", "output"]


@pytest.mark.parametrize(
    "source",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, (1, 3), padding="same", bias=False),
        nn.Linear(8, 3),
    ],
)
def test_empty_slots_are_the_torch_layer(source):
    layer = QuantConv2d(source) if isinstance(source, nn.Conv2d) else QuantLinear(source)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(x), source(x))
    assert layer.weight is source.weight and layer.bias is source.bias
    assert layer.state_dict().keys() == source.state_dict().keys()


def quantized_net(bits: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    slot = {"name": "lsq", "bits": bits}
    convert(net, Recipe(weight=slot, input=slot), "0", "3")
    calibrate(net.double(), [images()])
    return net


def images() -> torch.Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def test_offset_gradient_is_the_gradient_at_the_quantized_weights():
    net, x = quantized_net(), images()
    plain = copy.deepcopy(net)
    for layer, values in zip((plain[0], plain[3]), quantized_weights(net).values(), strict=True):
        layer.weight_quantizer = None
        layer.weight.data.copy_(values)
    expected = torch.autograd.grad(plain(x).square().sum(), [plain[0].weight, plain[3].weight])
    with weight_leaves(net) as offsets:
        gradients = torch.autograd.grad(net(x).square().sum(), list(offsets.values()))
    assert list(offsets) == ["0", "3"]
    for gradient, target in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, target, rtol=0, atol=1e-12)
    assert net[0].weight_offset is None


def test_offset_moves_the_quantized_weight_off_its_grid():
    net, x = quantized_net(), images()
    before = quantized_weights(net)
    shift = torch.full_like(net[3].weight, 0.01)
    with weight_leaves(net, {"3": shift}) as offsets:
        assert torch.equal(quantized_weights(net)["3"], before["3"] + 0.01)
        assert offsets["3"] is shift and torch.equal(quantized_weights(net)["0"], before["0"])
        shifted = net(x)
    assert not torch.equal(shifted, net(x))


def test_scale_gradient_flows_to_frozen_codes():
    class FrozenCodes(nn.Module):
        """Where ``frozen``, these codes instead of those of the latent weight."""

        def __init__(self, codes: torch.Tensor, frozen: torch.Tensor):
            super().__init__()
            self.register_buffer("codes", codes)
            self.register_buffer("frozen", frozen)

        def forward(self, weight, layer):
            return torch.where(self.frozen, layer.weight_quantizer.dequantize(self.codes), weight)

    layer = QuantLinear(nn.Linear(4, 3, bias=False))
    layer.weight_quantizer = build_quantizer(
        QuantizerSpec("lsq", 4, options={"gradient_factor": False}), (3, 4), 0, "weight"
    )
    layer.weight_quantizer.initialise(layer.weight)
    scale = layer.weight_quantizer.raw_scale
    latent = layer.weight.detach() / scale.detach()
    rounded = torch.round(torch.clamp(latent, -8, 7))
    inside = (latent >= -8) & (latent <= 7)
    frozen = torch.zeros(3, 4, dtype=torch.bool)
    frozen[1] = True
    codes = torch.tensor([-3.0, 0.0, 2.0, 7.0]).expand(3, 4).clone()
    layer.weight_override = FrozenCodes(codes, frozen)
    upstream = torch.randn(3, 4)
    (layer.quantized_weight() * upstream).sum().backward()
    per_element = torch.where(frozen, codes, torch.where(inside, rounded - latent, rounded))
    torch.testing.assert_close(scale.grad, (upstream * per_element).sum())
    assert torch.equal(layer.weight.grad[1], torch.zeros(4))
    torch.testing.assert_close(layer.weight.grad[0], torch.where(inside, upstream, 0.0)[0])
    torch.testing.assert_close(quantized_weights(nn.Sequential(layer))["0"][1], codes[1] * scale.detach())


def test_listing():
    net = quantized_net()
    net[1] = QuantOutput(net[1], build_quantizer(QuantizerSpec(bits=4), (), None, "output"))
    assert [name for name, _ in quant_layers(net)] == ["0", "3"]
    assert [name for name, _ in quantizers(net)] == [
        "0.input_quantizer", "0.weight_quantizer", "1.output_quantizer", "3.input_quantizer", "3.weight_quantizer"
    ]  # fmt: skip
    assert isinstance(quantized_weights(net)["0"], torch.Tensor)
    assert not quantized_weights(net)["0"].requires_grad
