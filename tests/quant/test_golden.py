"""Reference vectors: cases are found by the names of the arrays, every number comes from the file."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from research.quant.output_scale import OutputScale
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.base import Quantizer
from research.quant.quantizers.ewgs import EWGS, ewgs_round
from research.quant.quantizers.lsq import lsq_gradient_factor
from research.quant.ranges import (
    affine_from_range,
    clipstd_range,
    ema_minmax,
    initial_affine,
    initial_scale,
    lsq_scale,
    minmax_range,
    mse_range,
    power_of_two,
    three_sigma_range,
)

Golden = Callable[[str], dict[str, np.ndarray]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROLES = {"w": "weight", "a": "input", "pc": "weight"}


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=tolerance, atol=tolerance)


def cases(arrays: dict[str, np.ndarray], pattern: str) -> list[tuple[re.Match[str], dict[str, Tensor]]]:
    """Matches of `pattern` (a prefix) among the names, each with its fields; fails if there is none."""
    prefixes = {match.group(0): match for name in arrays if (match := re.match(pattern, name))}
    assert prefixes, f"no array matches {pattern}"
    return [
        (match, {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)})
        for prefix, match in prefixes.items()
    ]


def make(name: str, bits: int, role: str, data: Tensor, channel: bool = False, **fields: object) -> Quantizer:
    spec = QuantizerSpec(name=name, bits=bits, granularity="channel" if channel else "tensor", **fields)
    quantizer = build_quantizer(spec, data.shape if role == "weight" else (), 0 if role == "weight" else None, role)
    return quantizer.to(data.dtype)


def set_(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.reshape(parameter.shape))


def gradients(quantizer: Quantizer, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of `x`; parameters get theirs."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x)
    (out * upstream).sum().backward()
    return out, x.grad


def test_lsq(golden: Golden) -> None:
    for match, case in cases(golden("lsq"), r"lsq_(w|a|pc)(\d)_"):
        kind, bits = match.group(1), int(match.group(2))
        quantizer = make("lsq", bits, ROLES[kind], case["v"], channel=kind == "pc")
        quantizer.initialise(case["v"])
        close(quantizer.scale, case["s_init"])
        set_(quantizer.raw_scale, case["s_init"])
        out, grad = gradients(quantizer, case["v"], case["upstream"])
        close(out, case["out"])
        close(grad, case["grad_v"])
        close(quantizer.raw_scale.grad, case["grad_s"])
        if "gradscale" in case:
            factor = lsq_gradient_factor(case["v"].numel() // quantizer.raw_scale.numel(), quantizer.limits()[1])
            torch.testing.assert_close(factor.double(), case["gradscale"], rtol=1e-6, atol=0)
        if "clip_s" in case:
            set_(quantizer.raw_scale, case["clip_s"])
            out, grad = gradients(quantizer, case["v"], case["upstream"])
            close(out, case["clip_out"])
            close(grad, case["clip_grad_v"])
            close(quantizer.raw_scale.grad, case["clip_grad_s"])


def test_lsq_without_the_gradient_factor(golden: Golden) -> None:
    for match, case in cases(golden("lsq"), r"lsq_pc(\d)_"):
        quantizer = make(
            "lsq", int(match.group(1)), "weight", case["v"], channel=True, options={"gradient_factor": False}
        )
        set_(quantizer.raw_scale, case["s_init"])
        gradients(quantizer, case["v"], case["upstream"])
        close(quantizer.raw_scale.grad, case["grad_s_unscaled"])


def test_lsq_plus(golden: Golden) -> None:
    for match, case in cases(golden("lsq"), r"lsqplus_a(\d)_"):
        quantizer = make("lsq_plus", int(match.group(1)), "input", case["v"], options={"configuration": "C3"})
        set_(quantizer.raw_scale, case["s"])
        set_(quantizer.raw_offset, case["beta"])
        out, grad = gradients(quantizer, case["v"], case["upstream"])
        close(out, case["out"])
        close(grad, case["grad_v"])
        close(quantizer.raw_scale.grad, case["grad_s"])
        close(quantizer.raw_offset.grad, case["grad_beta"])


def test_lsq_plus_weight_initialisation(golden: Golden) -> None:
    for _, case in cases(golden("lsq"), "lsqplus_winit_"):
        widths = [int(field[1:]) for field in case if re.fullmatch(r"s\d", field)]
        assert widths
        for bits in widths:
            quantizer = make("lsq_plus", bits, "weight", case["v"], init="three_sigma")
            quantizer.initialise(case["v"])
            close(quantizer.scale, case[f"s{bits}"])


def test_pact(golden: Golden) -> None:
    for _, case in cases(golden("lsq"), r"pact_"):
        steps = (case["out"] / case["alpha"]).unique()
        bits = int(torch.log2(1 / steps[steps > 0].diff().min()).round())
        quantizer = make("pact", bits, "input", case["x"])
        set_(quantizer.alpha, case["alpha"])
        out, grad = gradients(quantizer, case["x"], case["upstream"])
        close(out, case["out"])
        close(grad, case["grad_x"])
        close(quantizer.alpha.grad, case["grad_alpha"])


def test_dorefa(golden: Golden) -> None:
    for match, case in cases(golden("lsq"), r"dorefa_(w|a)(\d)_"):
        quantizer = make("dorefa", int(match.group(2)), ROLES[match.group(1)], case["v"])
        out, grad = gradients(quantizer, case["v"], case["upstream"])
        close(out, case["out"])
        close(grad, case["grad_v"])


def test_ewgs_discretiser(golden: Golden) -> None:
    for _, case in cases(golden("lsq"), r"ewgs_disc_"):
        n = case["levels"] - 1
        x = case["x"].clone().requires_grad_()
        out = ewgs_round(x * n, case["delta"] / n) / n
        (out * case["upstream"]).sum().backward()
        close(out, case["out"])
        close(x.grad, case["grad_x"])


def test_ewgs_layer(golden: Golden) -> None:
    for _, case in cases(golden("lsq"), r"ewgs_conv_"):
        x, w = case["x"].clone().requires_grad_(), case["w"].clone().requires_grad_()
        bits_w, bits_a = torch.log2(case["levels_wa"].double()).int().tolist()
        weights, inputs = make("ewgs", bits_w, "weight", w), make("ewgs", bits_a, "input", x)
        assert isinstance(weights, EWGS) and isinstance(inputs, EWGS)
        weights.initialise(w)
        inputs.initialise(x)
        padding = (case["out"].shape[-1] - x.shape[-1] + w.shape[-1] - 1) // 2
        scale = OutputScale().double()
        with torch.no_grad():
            output = torch.nn.functional.conv2d(x, w, padding=padding)
            scale.initialise(output, torch.nn.functional.conv2d(inputs(x), weights(w), padding=padding))
        found = {"lW": weights.lower, "uW": weights.upper, "lA": inputs.lower, "uA": inputs.upper}
        found["output_scale"] = scale.output_scale
        for field, value in found.items():
            close(value, case[field])
        weights.delta, inputs.delta = case["delta_wa"].float()  # float32 buffers in the official layer
        out = scale(torch.nn.functional.conv2d(inputs(x), weights(w), padding=padding))
        (out * case["upstream"]).sum().backward()
        close(out, case["out"])
        for field, value in {**found, "x": x, "w": w}.items():
            close(value.grad, case[f"grad_{field}"])


OBSERVED = {"minmax": minmax_range, "clipstd": clipstd_range}
OBSERVER_BITS = {"sym": 4, "asym": 4, "symrange": 8, "pot": 8}


def test_observers(golden: Golden) -> None:
    arrays = golden("mqbench")
    for match, case in cases(arrays, r"obs_(w|a)_(minmax|lsq|clipstd|mse)_(pc|pt)_(symrange|sym|asym|pot)_"):
        data, method, granularity, kind = match.groups()
        x = torch.from_numpy(arrays[data])
        axis = 0 if granularity == "pc" else None
        bits = OBSERVER_BITS[kind]
        half = 2 ** (bits - 1)
        symmetric = kind != "asym"
        low, high = (-half + (kind == "symrange"), half - 1) if symmetric else (0, 2**bits - 1)
        qmin, qmax = torch.tensor(float(low)), torch.tensor(float(high))
        if method == "lsq" and data == "a":
            x = x.abs()
        if method == "lsq" and symmetric:
            scale, zero_point = lsq_scale(x, qmax, axis), torch.zeros(())
        elif method == "lsq":
            scale, zero_point = initial_affine(x, "lsq", qmin, qmax, axis)
        else:
            found = mse_range(x, qmin, qmax, symmetric, axis) if method == "mse" else OBSERVED[method](x, axis)
            scale, zero_point = affine_from_range(*found, qmin, qmax, symmetric)
        close(power_of_two(scale) if kind == "pot" else scale, case["scale"])
        close(zero_point.expand_as(scale), case["zp"])


def test_moving_average_observer(golden: Golden) -> None:
    arrays = golden("mqbench")
    for _, case in cases(arrays, r"obs_a_ema2_"):
        first, second = (minmax_range(half) for half in torch.from_numpy(arrays["a"]).chunk(2))
        low, high = ema_minmax(ema_minmax(None, first), second)
        close(low, case["min"])
        close(high, case["max"])
        scale, zero_point = affine_from_range(low, high, torch.tensor(0.0), torch.tensor(255.0), symmetric=False)
        close(scale, case["scale"])
        close(zero_point, case["zp"])


def mqbench(golden: Golden, pattern: str) -> list[tuple[re.Match[str], dict[str, Tensor], Tensor, Tensor]]:
    """Cases with the tensor (`w` or `a`, the pattern's first group) and its upstream gradient."""
    arrays = {name: array for name, array in golden("mqbench").items()}
    return [
        (match, case, torch.from_numpy(arrays[match.group(1)]), torch.from_numpy(arrays[f"g{match.group(1)}"]))
        for match, case in cases(arrays, pattern)
    ]


def test_mqbench_lsq_of_weights(golden: Golden) -> None:
    for match, case, x, upstream in mqbench(golden, r"lsq_(w)_(pc|pt)_"):
        quantizer = make("lsq", 4, "weight", x, channel=match.group(2) == "pc", options={"mask": "round_first"})
        quantizer.initialise(x)
        close(quantizer.scale, case["scale"])
        out, grad = gradients(quantizer, x, upstream)
        close(out, case["y"])
        close(grad, case["gx"])
        close(quantizer.raw_scale.grad, case["g_scale"])


def test_mqbench_lsq_with_learned_zero_point(golden: Golden) -> None:
    for _, case, x, upstream in mqbench(golden, r"lsq_(a)_(pt|clip)_"):
        quantizer = make("lsq_plus", 4, "input", x, options={"offset": "integer", "mask": "round_first"})
        quantizer.initialise(x)
        set_(quantizer.raw_scale, case["scale"])
        close(quantizer.zero_point, case["zp"])
        out, grad = gradients(quantizer, x, upstream)
        close(out, case["y"])
        close(grad, case["gx"])
        close(quantizer.raw_scale.grad, case["g_scale"])
        close(quantizer.raw_offset.grad, case["g_zero_point"])


FIXED = {
    "trt": ({"narrow": True, "granularity": "channel"}, {"mask": "round_first"}),
    "snpe": ({}, {"symmetric": False, "mask": "round_first"}),
}


def test_mqbench_fixed(golden: Golden) -> None:
    for match, case, x, upstream in mqbench(golden, r"fixed_(w|a)_(trt|snpe)_"):
        fields, options = FIXED[match.group(2)]
        spec = QuantizerSpec(name="minmax", bits=8, init="minmax", options=options, **fields)
        role = ROLES[match.group(1)]
        quantizer = build_quantizer(spec, x.shape, 0 if role == "weight" else None, role)
        quantizer.initialise(x)
        out, grad = gradients(quantizer, x, upstream)
        close(out, case["y"])
        close(grad, case["gx"])


def test_mqbench_dorefa(golden: Golden) -> None:
    for _, case, x, upstream in mqbench(golden, r"dorefa_(w)_pt_"):
        quantizer = make("dorefa", 4, "weight", x, options={"weight_grid": "uniform", "eps": 1e-5})
        quantizer.initialise(x)
        close(quantizer.scale, case["scale"])
        out, grad = gradients(quantizer, x, upstream)
        close(out, case["y"])
        close(grad, case["gx"])


def test_mqbench_pact(golden: Golden) -> None:
    for _, case, x, upstream in mqbench(golden, r"pact_(a)_pt_"):
        quantizer = make("pact", 4, "input", x, options={"alpha": 1.0, "lower": -1.0})
        quantizer.initialise(x)
        close(quantizer.scale, case["scale"])
        close(quantizer.zero_point, case["zp"])
        out, grad = gradients(quantizer, x, upstream)
        close(out, case["y"])
        close(grad, case["gx"])
        close(quantizer.alpha.grad, case["g_alpha"])
        close(quantizer.beta.grad, case["g_n_alpha"])


def test_a_pattern_without_a_case_fails(golden: Golden) -> None:
    with pytest.raises(AssertionError, match="no array matches"):
        cases(golden("lsq"), r"no_such_method_")


def test_three_sigma_of_a_range_is_the_scale_of_the_longer_side() -> None:
    x = torch.tensor([-1.0, 0.0, 4.0])
    low, high = three_sigma_range(x)
    scale = initial_scale(x, "three_sigma", torch.tensor(-8.0), torch.tensor(7.0))
    torch.testing.assert_close(scale, torch.maximum(-low, high) / 8)
