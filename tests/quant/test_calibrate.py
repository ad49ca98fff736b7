import pytest
import torch
from torch import nn

from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import quantizers
from research.quant.passes import passes
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.ranges import initial_scale
from research.quant.recipe import Recipe

SLOT = {"name": "lsq", "bits": 4, "init": "minmax"}


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    net[1].running_mean.normal_()
    return net


def converted(**recipe) -> nn.Sequential:
    net = small_net()
    convert(net, Recipe(**{"weight": SLOT, "input": SLOT, **recipe}), "0", "4")
    return net


def images(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3, 8, 8) for _ in range(count)]


def scale(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return initial_scale(x, "minmax", torch.tensor(float(low)), torch.tensor(float(high)))


def test_ranges_of_the_float_network():
    net, batches = converted(), images()
    names = calibrate(net, batches)
    assert set(names) == {f"{layer}.{slot}_quantizer" for layer in (0, 4) for slot in ("input", "weight")}
    reference = small_net().eval()
    x = torch.cat(batches)
    torch.testing.assert_close(net[0].weight_quantizer.scale, scale(reference[0].weight, -8, 7))
    torch.testing.assert_close(net[0].input_quantizer.scale, scale(x, -8, 7))
    torch.testing.assert_close(net[4].input_quantizer.scale, scale(reference[:4](x), 0, 15))
    assert net[0].input_quantizer.signed and not net[4].input_quantizer.signed
    assert all(quantizer.initialised and quantizer.mode == "quantize" for _, quantizer in quantizers(net))


def test_nothing_else_moves():
    net = converted().train()
    net[1].eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    calibrate(net, images())
    moved = {key for key, value in net.state_dict().items() if not torch.equal(state[key], value)}
    assert moved and all("quantizer" in key for key in moved)
    assert net.training and net[0].training and not net[1].training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_initialised_quantizers_stay_unless_forced():
    net, batches = converted(), images()
    calibrate(net, batches)
    before = net[4].input_quantizer.scale.clone()
    assert calibrate(net, [10 * x for x in batches]) == []
    assert torch.equal(net[4].input_quantizer.scale, before)
    net[0].input_quantizer.initialised.fill_(False)
    assert calibrate(net, [10 * x for x in batches]) == ["0.input_quantizer"]
    assert torch.equal(net[4].input_quantizer.scale, before)
    assert len(calibrate(net, [10 * x for x in batches], force=True)) == 4
    assert net[4].input_quantizer.scale > before


def test_quantized_weights_first():
    net, batches = converted(weight={"name": "lsq", "bits": 2}), images()
    calibrate(net, batches, quantize_weights_first=True)
    reference = small_net().eval()
    reference[0].weight.data.copy_(net[0].quantized_weight())
    torch.testing.assert_close(net[4].input_quantizer.scale, scale(reference[:4](torch.cat(batches)), 0, 15))


def test_sequential_sees_quantized_inputs():
    coarse = {"name": "lsq", "bits": 2, "init": "minmax"}
    net, batches = converted(input=coarse), images()
    calibrate(net, batches, sequential=True)
    reference = small_net().eval()
    quantized = net[0].input_quantizer(torch.cat(batches))
    torch.testing.assert_close(net[4].input_quantizer.scale, scale(reference[:4](quantized), 0, 3))
    parallel = converted(input=coarse)
    calibrate(parallel, batches)
    assert parallel[4].input_quantizer.scale != net[4].input_quantizer.scale


def test_every_width_is_initialised():
    net, batches = converted(widths=(2, 4)), images()
    calibrate(net, batches)
    x = torch.cat(batches)
    for width, quantizer in net[0].input_quantizer.by_width.items():
        half = 2 ** (int(width) - 1)
        torch.testing.assert_close(quantizer.scale, scale(x, -half, half - 1))
        assert quantizer.signed
    assert len(net[0].weight_quantizer.by_width) == 2
    assert net[0].input_quantizer.limits()[0] == -8  # the sign of the data reaches the outer quantizer


def test_output_quantizers():
    outputs = [{"match": "2", "quantizer": SLOT}]
    net = small_net()
    convert(net, Recipe.from_config({"outputs": outputs}), "0", "4")
    batches = images()
    assert calibrate(net, batches) == ["2.output_quantizer"]
    torch.testing.assert_close(net[2].output_quantizer.scale, scale(small_net().eval()[:3](torch.cat(batches)), 0, 15))


@pytest.mark.parametrize("sequential", [False, True])
def test_unused_layer_is_named(sequential):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    net = Spare()
    convert(net, Recipe(weight=SLOT, input=SLOT), "used", "spare")
    with pytest.raises(ValueError, match="spare.input_quantizer"):
        calibrate(net, [torch.randn(2, 3)], sequential=sequential)


def test_observed_sample_favours_no_column():
    quantizer = build_quantizer(QuantizerSpec(), (), None, "input")
    columns = torch.arange(32.0).expand(64, 16, 32, 32)
    quantizer.observe(columns)
    counts = torch.bincount(quantizer._observed[0][:-2].long(), minlength=32)
    assert counts.sum() < 2**18 and counts.max() - counts.min() <= 1


def test_output_scales_keep_the_magnitude_of_every_layer():
    ewgs = {"name": "ewgs", "bits": 3}
    net, batches = converted(weight=ewgs, input=ewgs), images()
    outputs = []
    net[0].register_forward_hook(lambda *call: outputs.append(call[2]))
    calibrate(net, batches)
    with passes(net.eval(), mode="identity"):
        expected = nn.functional.conv2d(batches[0], net[0].weight, net[0].bias).abs().mean()
    net(batches[0])
    torch.testing.assert_close(outputs[-1].abs().mean(), expected)
    x = net[:4](batches[0])
    torch.testing.assert_close(net[4](x).abs().mean(), nn.functional.linear(x, net[4].weight, net[4].bias).abs().mean())
    assert net[4].output_quantizer.output_scale != 1
    before = net[4].output_quantizer.output_scale.clone()
    calibrate(net, [9 * x for x in batches])
    assert torch.equal(net[4].output_quantizer.output_scale, before)
    with pytest.raises(ValueError, match="0.output_quantizer.*needs a batch"):
        calibrate(converted(weight=ewgs, input=None), [])


def test_no_batches():
    with pytest.raises(ValueError, match="0.input_quantizer"):
        calibrate(converted(), [])
    assert len(calibrate(converted(input=None), [])) == 2
