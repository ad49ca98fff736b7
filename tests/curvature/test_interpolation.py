"""The line between two networks: exact ends at both levels, the right network in between."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.curvature.interpolation import LEVELS, dequantized, interpolated, interpolation
from research.learning.finalise import measure
from research.learning.tasks import Classification
from research.quant.layers import quant_layers, quantized_weights
from tests.curvature.test_sharpness import images, quantized_net

TASK = Classification(4)


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Two networks with other weights, statistics and ranges."""
    one, other = quantized_net(), quantized_net()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        other[1].running_mean += 0.3
        other[1].running_var *= 4.0
        other[1].num_batches_tracked += 7
    return one.eval(), other.eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = images()
    return [(x[:6], y[:6]), (x[6:], y[6:])]


@pytest.mark.parametrize("level", LEVELS)
def test_the_ends_are_the_two_networks_bit_for_bit(level: Any) -> None:
    one, other = pair()
    before = [copy.deepcopy(net.state_dict()) for net in (one, other)]
    rows = interpolation(one, other, TASK, batches(), [-0.5, 0.0, 0.5, 1.0, 1.5], level)
    assert [row["t"] for row in rows] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert rows[1] == {"t": 0.0, **measure(one, TASK, batches())}
    assert rows[3] == {"t": 1.0, **measure(other, TASK, batches())}
    assert len({row["loss"] for row in rows}) == 5 and all(torch.tensor([row["loss"] for row in rows]).isfinite())
    for net, state in zip((one, other), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_in_between_latent_weights_are_interpolated_then_quantized() -> None:
    one, other = pair()
    net = interpolated(one, other, 0.25)
    torch.testing.assert_close(net[0].weight, 0.75 * one[0].weight + 0.25 * other[0].weight)
    clip = [n[0].weight_quantizer.raw_clip for n in (one, other, net)]
    torch.testing.assert_close(clip[2], 0.75 * clip[0] + 0.25 * clip[1])
    codes = net[0].weight_quantizer.codes(net[0].weight)
    assert torch.equal(quantized_weights(net)["0"], net[0].weight_quantizer.dequantize(codes))
    assert torch.equal(net[1].num_batches_tracked, one[1].num_batches_tracked)


def test_in_between_dequantized_weights_leave_the_grid() -> None:
    one, other = pair()
    net = interpolated(dequantized(one), dequantized(other), 0.25)
    for name, layer in quant_layers(net):
        expected = 0.75 * quantized_weights(one)[name] + 0.25 * quantized_weights(other)[name]
        assert layer.weight_quantizer is None and layer.input_quantizer is not None
        torch.testing.assert_close(layer.weight, expected, check_stride=False)


@pytest.mark.parametrize(("t", "end"), [(-0.5, 0), (1.5, 1)])
def test_beyond_an_end_statistics_and_ranges_keep_its_values(t: float, end: int) -> None:
    nets = pair()
    net = interpolated(*nets, t)
    torch.testing.assert_close(net[0].weight, (1 - t) * nets[0][0].weight + t * nets[1][0].weight)
    torch.testing.assert_close(net[1].bias, (1 - t) * nets[0][1].bias + t * nets[1][1].bias)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(net[1], name), getattr(nets[end][1], name))
    assert torch.equal(net[5].input_quantizer.raw_clip, nets[end][5].input_quantizer.raw_clip)


def test_unequal_widths_meet_only_behind_the_quantizer() -> None:
    one, other = pair()
    other[0].weight_quantizer.bits = torch.tensor(4.0)
    with pytest.raises(ValueError, match=r"other: 0.weight_quantizer.bits differs.*use level=quantized"):
        interpolation(one, other, TASK, batches(), [0.5], "latent")
    assert len(interpolation(one, other, TASK, batches(), [0.5], "quantized")) == 1


def test_nothing_lies_between_two_architectures() -> None:
    one, _ = pair()
    with pytest.raises(ValueError, match="other: .*use two runs of one model and quantizer"):
        interpolated(one, nn.Sequential(*list(quantized_net())[:-1], nn.Linear(64, 4)).double(), 0.5)
    with pytest.raises(ValueError, match="level=codes: use one of latent, quantized"):
        interpolation(one, one, TASK, batches(), [0.5], "codes")  # type: ignore[arg-type]
