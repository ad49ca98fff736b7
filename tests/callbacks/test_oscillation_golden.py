"""The formulas against vectors of the official classes; every setting is read from the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from callbacks.oscillation.dampening import Aggregation, dampening_loss
from callbacks.oscillation.freezing import OscillationFreezing
from callbacks.oscillation.frozen import FreezableHistory, Freezing, FrozenCodes, freeze
from callbacks.oscillation.schedule import annealed
from research.quant.batchnorm import reestimate_batchnorm
from research.quant.layers import QuantConv2d, QuantLinear
from research.quant.oscillation import start, track
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ
from research.quant.ranges import mse_scale, quantization_error

Golden = Callable[[str], dict[str, np.ndarray]]
WARMUP = 0.25


@pytest.fixture
def vectors(golden: Golden) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values) for name, values in golden("oscillations").items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def quantizer(bits: int, scale: Tensor, signed: bool = True, gradient_factor: bool = False) -> LSQ:
    """LSQ as the official code has it: rounds first, then clips."""
    spec = QuantizerSpec("lsq", bits, signed=signed)
    made = LSQ(spec, (), None, "weight", gradient_factor=gradient_factor, mask="round_first").double()
    made.raw_scale.data.copy_(scale)
    return made


@pytest.mark.parametrize("name", ["qw3_gs0", "qw3_gs1", "qw4_gs0", "qw4_gs1", "qa3", "qa4"])
def test_the_base_quantizer(name: str, vectors: dict[str, Tensor]) -> None:
    base = quantizer(int(name[2]), vectors[f"{name}_scale"], name[1] == "w", name.endswith("gs1"))
    v = vectors[f"{name}_v"].requires_grad_()
    out = base(v)
    (out * vectors[f"{name}_upstream"]).sum().backward()
    close(out, vectors[f"{name}_out"])
    close(v.grad, vectors[f"{name}_grad_v"])
    close(base.raw_scale.grad, vectors[f"{name}_grad_scale"])
    if name[1] == "w":
        assert torch.equal(base.codes(v).double(), vectors[f"{name}_int"])


def test_tracking_and_freezing(vectors: dict[str, Tensor]) -> None:
    latent, momentum = vectors["trk_latent"], float(vectors["trk_momentum"])
    base = quantizer(3, vectors["trk_scale"])
    zeros = torch.zeros_like(latent[0])
    freezing, oscillation, begun = Freezing(zeros.bool(), zeros, zeros), None, False
    for call, threshold in enumerate(vectors["trk_threshold"].tolist()):
        codes = torch.where(freezing.frozen, freezing.frozen_codes, base.codes(latent[call]).double())
        oscillation = start(codes, torch.float64) if oscillation is None else track(oscillation, codes, momentum)
        if threshold > 0:
            before = freezing if begun else freezing._replace(average=codes)
            freezing, begun = freeze(before, codes, oscillation.frequency, momentum, threshold), True
            close(freezing.average, vectors["trk_ema_int"][call])
        assert torch.equal(codes, vectors["trk_int"][call])
        assert torch.equal(oscillation.oscillations, vectors["trk_total"][call])
        assert torch.equal(freezing.frozen, vectors["trk_frozen"][call])
        assert torch.equal(freezing.frozen_codes, vectors["trk_frozen_int"][call])
        close(oscillation.frequency, vectors["trk_ema_freq"][call])
    assert begun and int(freezing.frozen.sum()) > 0


def test_a_layer_with_frozen_codes(vectors: dict[str, Tensor]) -> None:
    layer = QuantLinear(nn.Linear(vectors["frz_v"].numel(), 1, bias=False)).double()
    layer.weight = nn.Parameter(vectors["frz_v"][None])
    layer.weight_quantizer = quantizer(3, vectors["frz_scale"])
    history = FreezableHistory(layer.weight, layer.weight_quantizer.bits)
    history.frozen.copy_(vectors["frz_mask"])
    history.frozen_codes.copy_(vectors["frz_int"])
    layer.weight_override = FrozenCodes(history)
    out = layer.quantized_weight()
    (out * vectors["frz_upstream"]).sum().backward()
    close(out[0], vectors["frz_out"])
    close(layer.weight.grad[0], vectors["frz_grad_v"])
    close(layer.weight_quantizer.raw_scale.grad, vectors["frz_grad_scale"])


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_dampening(aggregation: Aggregation, vectors: dict[str, Tensor]) -> None:
    base = quantizer(int(vectors["damp_bits"]), vectors["damp_scale"])
    v = vectors["damp_v"].requires_grad_()
    loss = dampening_loss(v, base.scale, *base.limits(), aggregation)
    (slope,) = torch.autograd.grad(loss, v)
    close(loss, vectors[f"damp_{aggregation}_loss"])
    close(slope, vectors[f"damp_{aggregation}_grad_v"])
    assert float(vectors[f"damp_{aggregation}_grad_scale"]) == 0
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(dampening_loss(v, base.scale, *base.limits(), aggregation), base.raw_scale)


@pytest.mark.parametrize("name", ["damp", "freeze"])
def test_schedules(name: str, vectors: dict[str, Tensor]) -> None:
    first, last = vectors[f"sched_{name}_range"].tolist()
    steps = vectors[f"sched_{name}_t"].tolist()
    found = [annealed(step, steps[-1], first, last, WARMUP) for step in steps]
    close(torch.tensor(found, dtype=torch.float64), vectors[f"sched_{name}_value"])


def test_the_threshold_is_zero_up_to_the_warm_up(vectors: dict[str, Tensor]) -> None:
    first, last = vectors["trk_threshold_range"].tolist()
    thresholds = vectors["trk_threshold"]
    mechanic = OscillationFreezing(threshold_start=first, threshold_final=last, warmup=WARMUP)
    found = [mechanic.threshold(step, len(thresholds)) for step in range(1, len(thresholds) + 1)]
    close(torch.tensor(found, dtype=torch.float64), thresholds)


def test_batchnorm_statistics(vectors: dict[str, Tensor]) -> None:
    w = vectors["bn_w"]
    conv: Any = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], padding=1, bias=False).double()
    conv.weight.data.copy_(w)
    net = nn.Sequential(QuantConv2d(conv), nn.BatchNorm2d(w.shape[0]).double())
    for _ in range(2):  # the second time changes nothing
        reestimate_batchnorm(net, vectors["bn_x"])
        close(net[1].running_mean, vectors["bn_running_mean"])
        close(net[1].running_var, vectors["bn_running_var"])


@pytest.mark.parametrize("bits", [3, 4])
def test_our_range_is_no_worse_than_that_of_the_official_search(bits: int, vectors: dict[str, Tensor]) -> None:
    v, qmax = vectors[f"mse{bits}_v"], torch.tensor(2.0 ** (bits - 1) - 1)
    qmin, zero = -qmax - 1, torch.tensor(0.0)
    candidates = torch.arange(1, 101) / 100 * (v.abs().max() + 0.5) / qmax
    errors = torch.stack([quantization_error(v, scale, zero, qmin, qmax) for scale in candidates])
    official = vectors[f"mse{bits}_scale"][0]  # float32 in the file
    best = candidates[errors.argmin()].float()
    torch.testing.assert_close(best, official, rtol=1e-6, atol=0)
    for end, sign in (("xmin", -1), ("xmax", 1)):
        torch.testing.assert_close(sign * qmax * best, vectors[f"mse{bits}_{end}"][0], rtol=1e-6, atol=0)
    assert float(quantization_error(v, mse_scale(v, qmin, qmax), zero, qmin, qmax)) <= float(errors.min())
