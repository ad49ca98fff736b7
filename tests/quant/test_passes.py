import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import quantizers
from research.quant.passes import passes, weight_leaves
from research.quant.recipe import Recipe


def quantized_net(widths: tuple[int, ...] = (), bits: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    slot = {"name": "lsq", "bits": bits}
    convert(net, Recipe(weight=slot, input=slot, widths=widths), "0", "4")
    calibrate(net, [images()])
    return net


def images() -> torch.Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def state(net: nn.Module) -> tuple:
    return tuple((id(quantizer.bits), quantizer.mode) for _, quantizer in quantizers(net)) + tuple(
        module.training for module in net.modules()
    )


def test_bits_equal_a_net_of_that_width():
    net, x = quantized_net().eval(), images()
    narrow = quantized_net(bits=2).eval()
    narrow.load_state_dict(
        {key: value for key, value in net.state_dict().items() if not key.endswith("bits")}, strict=False
    )
    with passes(net, bits=2):
        assert torch.equal(net(x), narrow(x))
    with passes(net, bits=torch.tensor(2.0)):
        assert torch.equal(net(x), narrow(x))
    assert not torch.equal(net(x), narrow(x))
    one = {"4.weight_quantizer": 2}
    with passes(net, bits=one):
        assert net[4].weight_quantizer.bits == 2 and net[0].weight_quantizer.bits == 4


def test_bits_per_channel():
    net = quantized_net()
    per_channel = torch.tensor([0.0, 2.0, 4.0, 8.0]).view(4, 1)
    with passes(net, bits={"4.weight_quantizer": per_channel}):
        codes = net[4].weight_quantizer.codes(net[4].weight * 100)
    assert [int(row.min()) for row in codes] == [0, -2, -8, -128]
    assert [int(row.max()) for row in codes] == [0, 1, 7, 127]


def test_modes():
    net, x = quantized_net().eval(), images()
    float_net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    float_net.load_state_dict(net.state_dict(), strict=False)
    with passes(net, mode="identity"):
        assert torch.equal(net(x), float_net(x))
    with passes(net, mode={"weight": "identity"}):
        assert torch.equal(net[0].quantized_weight(), net[0].weight)
        assert not torch.equal(net(x), float_net(x))
    with passes(net, mode="relax"):
        scale = net[0].weight_quantizer.scale
        expected = torch.clamp(net[0].weight / scale, -8, 7) * scale
        assert torch.equal(net[0].quantized_weight(), expected)


def test_batchnorm():
    net, x = quantized_net().train(), images()
    before = net[1].running_mean.clone()
    with passes(net, batchnorm="running"):
        running = net(x)
    assert torch.equal(net[1].running_mean, before)
    assert torch.equal(running, net.eval()(x))
    with passes(net, batchnorm="batch"):
        assert torch.allclose(net[:2](x).mean((0, 2, 3)), net[1].bias, atol=1e-5)
    assert not torch.equal(net[1].running_mean, before) and not net[1].training


def test_restored_after_an_error_and_when_nested():
    net = quantized_net()
    before = state(net)
    with pytest.raises(RuntimeError, match="inside"), passes(net, bits=2, mode="identity", batchnorm="running"):
        assert state(net) != before
        with passes(net, bits=3):
            assert net[0].weight_quantizer.bits == 3
        assert net[0].weight_quantizer.bits == 2
        raise RuntimeError("inside")
    assert state(net) == before
    with pytest.raises(RuntimeError, match="inside"), weight_leaves(net):
        assert net[0].weight_offset is not None
        raise RuntimeError("inside")
    assert net[0].weight_offset is None
    with pytest.raises(ValueError, match="no mode"), passes(net, bits=2, mode="off"):
        pass
    assert state(net) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": {"0.weight": 2}}, "no quantizer '0.weight'; there are 0.input_quantizer"),
        ({"mode": "off"}, "no mode 'off'; there are quantize"),
        ({"mode": {"bias": "identity"}}, "no role 'bias'; there are weight"),
        ({"batchnorm": 4}, "batchnorm=4 needs quantizer.widths"),
        ({"batchnorm": "eval"}, "batchnorm='eval' needs quantizer.widths"),
    ],
)
def test_errors(arguments, message):
    net = quantized_net()
    with pytest.raises(ValueError, match=message), passes(net, **arguments):
        pass


def test_unknown_offset_and_width():
    net = quantized_net(widths=(2, 4))
    with pytest.raises(ValueError, match="no layer '7'"), weight_leaves(net, {"7": torch.zeros(1)}):
        pass
    with pytest.raises(ValueError, match="no PerWidth for width 3: quantizer.widths has 2, 4"), passes(net, bits=3):
        pass
    with pytest.raises(ValueError, match="no SwitchableBatchNorm2d for width 8"), passes(net, batchnorm=8):
        pass


@pytest.mark.parametrize("widths", [(), (2, 4)])
def test_several_widths_share_one_backward(widths):
    net, x = quantized_net(widths), images()

    def run(width: int) -> torch.Tensor:
        with passes(net, bits=width, batchnorm=width if widths else "running"):
            return net(x).square().mean()

    (run(2) + run(4)).backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for width in (2, 4):
        run(width).backward()
    assert together.keys() == {name for name, p in net.named_parameters() if p.grad is not None}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    assert len(together) == len(list(net.parameters()))


def test_state_per_width():
    net = quantized_net((2, 4)).eval()
    quantizer, x = net[0].weight_quantizer, images()
    with passes(net, bits=2, batchnorm=2):
        assert quantizer.bits == 2 and quantizer.expected_bits == 2 and quantizer.limits()[1] == 1
        assert torch.equal(quantizer.scale, quantizer.by_width["2"].scale)
        narrow = net(x)
    assert quantizer.bits == 4 and quantizer.limits()[1] == 7
    assert not torch.equal(narrow, net(x))
    assert quantizer.by_width["2"].scale != quantizer.by_width["4"].scale


def test_no_recompilation_across_widths():
    net, x = quantized_net().eval(), images()
    frames = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=frames)
    outputs = []
    for width in (4, 2, 3, 4):
        with passes(net, bits=width):
            outputs.append(compiled(x))
            assert torch.equal(outputs[-1], net(x))
    assert frames.frame_count == 1
    assert torch.equal(outputs[0], outputs[3]) and not torch.equal(outputs[0], outputs[1])
