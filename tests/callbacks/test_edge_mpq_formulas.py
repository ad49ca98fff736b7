"""Edge-MPQ: golden vectors, and the identities of its formulas, its quantizer and its penalty."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.edge_mpq.formulas import (
    GAP,
    GRADIENT_DEPENDENT,
    SURROGATES,
    Surrogate,
    in_codes,
    power_of_two_step,
    projected,
    ramp,
    slope_excess,
    surrogate_round,
    width,
)
from callbacks.edge_mpq.quantizer import RANGES, STEPS, StepRange
from research.quant.quantizers import QuantizerSpec, Role, build_quantizer
from research.quant.quantizers.lsq import lsq_gradient_factor
from research.quant.ste import scale_gradient

DOUBLE = torch.float64
SIGNED, UNSIGNED = torch.tensor(True), torch.tensor(False)
LAST_AXIS = 3


def step_range(role: Role = "weight", bits: int = 4, shape: tuple[int, ...] = (), **options: Any) -> StepRange:
    """In float64; a weight with a shape has a slice for each index of the last axis."""
    granularity = "channel" if shape else "tensor"
    signed = role == "weight"
    spec = QuantizerSpec(
        "callbacks.edge_mpq.StepRange", bits, signed=signed, narrow=signed, granularity=granularity, options=options
    )
    found = build_quantizer(spec, shape, LAST_AXIS if shape else None, role).double()
    assert isinstance(found, StepRange)
    return found


def put(quantizer: StepRange, d: Tensor | float, xmax: Tensor | float) -> StepRange:
    """Give it a step and a range."""
    for parameter, value in ((quantizer.d, d), (quantizer.xmax, xmax)):
        parameter.data.copy_(torch.as_tensor(value, dtype=DOUBLE).reshape(parameter.shape))
    quantizer.settle_bits()
    return quantizer


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden("edge_mpq").items()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().to(DOUBLE).reshape(expected.shape), expected, rtol=1e-10, atol=1e-10)


# -- golden vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_golden_rounding_and_its_gradients(surrogate: Surrogate, vectors: dict[str, Tensor]) -> None:
    x = vectors["round_x"].requires_grad_()
    y = surrogate_round(x, surrogate, float(vectors["g_scale"]))
    same(y, vectors["round_y"])
    (gradient,) = torch.autograd.grad(y, x, vectors["round_gout"])
    same(gradient, vectors[f"round_grad_{surrogate}"])


def check_golden(quantizer: StepRange, prefix: str, upstream: Tensor, vectors: dict[str, Tensor], x: Tensor) -> None:
    """Values, their gradients, widths and size."""
    y = quantizer(x.requires_grad_())
    same(y, vectors[f"{prefix}_y"])
    gradients = torch.autograd.grad(y, (x, quantizer.d, quantizer.xmax), upstream)
    for name, gradient in zip(("x", "d", "xmax"), gradients, strict=True):
        same(gradient, vectors[f"{prefix}_grad_{name}"])


def check_golden_size(quantizer: StepRange, prefix: str, numel: int, vectors: dict[str, Tensor]) -> None:
    size = numel * quantizer.expected_bits.mean()
    same(size, vectors[f"{prefix}_size_bits"])
    for name, gradient in zip(("d", "xmax"), torch.autograd.grad(size, (quantizer.d, quantizer.xmax)), strict=True):
        same(gradient, vectors[f"{prefix}_size_grad_{name}"])


def test_golden_weights_with_slices(vectors: dict[str, Tensor]) -> None:
    x = vectors["w_x"]
    options = {"surrogate": "ewgs", "delta": float(vectors["g_scale"])}
    quantizer = step_range(bits=int(vectors["w_bits_init"]), shape=tuple(x.shape), **options)
    quantizer.initialise(x)
    same(quantizer.xmax, vectors["w_init_xmax"])
    same(quantizer.d, vectors["w_init_d"])
    put(quantizer, vectors["w_d"], vectors["w_xmax"])
    check_golden(quantizer, "w", vectors["w_gout"], vectors, x)
    same(quantizer.bits, vectors["w_slice_bits"])
    check_golden_size(quantizer, "w", x.numel(), vectors)


def test_golden_inputs(vectors: dict[str, Tensor]) -> None:
    x = vectors["a_x"]
    options = {"surrogate": "invtanh", "delta": float(vectors["g_scale"])}
    quantizer = step_range("input", bits=int(vectors["a_bits_init"]), **options)
    quantizer.initialise(x)
    same(quantizer.xmax, vectors["a_init_xmax"])
    put(quantizer, vectors["a_d"], vectors["a_xmax"])
    check_golden(quantizer, "a", vectors["a_gout"], vectors, x)
    same(quantizer.bits, vectors["a_bits"])
    check_golden_size(quantizer, "a", x[0].numel(), vectors)


def test_golden_steps_that_are_powers_of_two(vectors: dict[str, Tensor]) -> None:
    quantizer = put(step_range(power_of_two=True, least=2), vectors["p2_d"], vectors["p2_xmax"])
    check_golden(quantizer, "p2", vectors["w_gout"], vectors, vectors["w_x"])
    same(quantizer.bits, vectors["p2_bits"])
    same(vectors["w_x"].numel() * quantizer.expected_bits, vectors["p2_size_bits"])


def test_golden_step_alone(vectors: dict[str, Tensor]) -> None:
    """The official code's first phase: LSQ with symmetric codes, this rounding, and gradients clipped to the step."""
    x, step = vectors["w_x"].requires_grad_(), vectors["lsq_step"].requires_grad_()
    top = torch.exp2(vectors["w_bits_init"] - 1) - 1
    s = scale_gradient(step, lsq_gradient_factor(x.numel(), top))
    y = s * surrogate_round(torch.clamp(x / s, -top, top), "ewgs", float(vectors["g_scale"]))
    same(y, vectors["lsq_y"])
    grad_x, grad_step = torch.autograd.grad(y, (x, step), vectors["w_gout"])
    same(grad_x, vectors["lsq_grad_x"])
    torch.testing.assert_close(grad_step.clamp(-step, step).detach(), vectors["lsq_grad_step"], rtol=1e-8, atol=0)


# -- widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "role"), [(SIGNED, "weight"), (UNSIGNED, "input")])
def test_widths_follow_from_step_and_range(bits: int, signed: Tensor, role: Role) -> None:  # check 1
    for dtype in (DOUBLE, torch.float32):
        xmax = torch.linspace(0.01, 5, 50, dtype=dtype)
        top = 2 ** (bits - int(signed)) - 1
        assert set(width(xmax / top, xmax, signed, 1).tolist()) == {bits}
    quantizer = step_range(role, bits=bits)
    x = torch.linspace(-0.5, 0.5, 101, dtype=DOUBLE) if role == "weight" else torch.linspace(0, 3, 100, dtype=DOUBLE)
    quantizer.initialise(x)
    assert float(quantizer.bits) == bits


@pytest.mark.parametrize(
    ("ratio", "signed", "bits"), [(7.0, SIGNED, 4), (7.6, SIGNED, 5), (1.0, SIGNED, 2), (3.0, UNSIGNED, 2)]
)
def test_widths_of_some_ratios(ratio: float, signed: Tensor, bits: int) -> None:  # check 1
    assert float(width(torch.tensor(0.5), torch.tensor(0.5 * ratio), signed, 1)) == bits


@pytest.mark.parametrize(("role", "shape"), [("weight", ()), ("weight", (3, 3, 4, 5)), ("input", ())])
def test_codes_lie_within_the_top_one_and_need_the_stated_bits(role: Role, shape: tuple[int, ...]) -> None:  # check 2
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 4, 5, generator=generator, dtype=DOUBLE)
    quantizer = step_range(role, shape=shape)
    put(quantizer, 0.05 + 0.2 * torch.rand(quantizer.d.shape, generator=generator), torch.full_like(quantizer.d, 1.1))
    codes, k = quantizer.codes(x), torch.round(quantizer.xmax / quantizer.d)
    torch.testing.assert_close(quantizer(x), codes * quantizer.d, rtol=0, atol=0)
    assert bool((codes <= k).all()) and bool((codes >= (-k if role == "weight" else 0)).all())
    assert bool((codes == k).any())
    magnitude = quantizer.bits - int(quantizer.signed)
    assert bool((2**magnitude - 1 >= k).all()) and bool((2 ** (magnitude - 1) - 1 < k).all())


def test_at_the_least_width_the_size_has_no_gradient() -> None:  # check 6
    for d, expected in ((0.9, True), (0.3, False)):
        quantizer = put(step_range("input", least=1), d, 1.0)
        gradients = torch.autograd.grad(quantizer.expected_bits, (quantizer.d, quantizer.xmax))
        assert all((float(gradient) == 0) is expected for gradient in gradients)


def test_a_pass_at_fewer_bits_clips_and_at_none_prunes() -> None:
    x = torch.linspace(-2, 2, 41, dtype=DOUBLE)
    quantizer = put(step_range(), 0.1, 0.7)
    for bits, top in ((4, 7), (3, 3), (2, 1), (0, 0)):
        quantizer.bits = torch.tensor(float(bits))
        assert int(quantizer.codes(x).abs().max()) == top


# -- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_without_a_strength_every_surrogate_is_straight_through(surrogate: Surrogate) -> None:  # check 3
    u = torch.linspace(-3, 3, 50, dtype=DOUBLE).requires_grad_()
    g = torch.linspace(-1, 2, 50, dtype=DOUBLE)
    (gradient,) = torch.autograd.grad(surrogate_round(u, surrogate, 0.0), u, g)
    assert torch.equal(gradient, g)


@pytest.mark.parametrize("surrogate", GRADIENT_DEPENDENT)
def test_slopes_at_no_error_and_at_the_largest(surrogate: Surrogate) -> None:  # check 3
    e = torch.tensor([-0.5, 0.0, 0.5], dtype=DOUBLE)
    largest = 0.5 * float(torch.tanh(torch.tensor(2.0))) if surrogate == "tanh" else 0.5
    expected = torch.tensor([-largest, 0.0, largest], dtype=DOUBLE)
    torch.testing.assert_close(slope_excess(e, surrogate), expected, atol=1e-7, rtol=0)
    mixed = slope_excess(e + 1e-3, surrogate, mix=0.3)
    torch.testing.assert_close(mixed, 0.3 * slope_excess(e + 1e-3, surrogate) + 0.7 * (e + 1e-3), equal_nan=True)


@pytest.mark.parametrize(("surrogate", "slope"), [("acos", torch.sin), ("psgd", torch.abs)])
def test_surrogates_that_are_functions_have_second_derivatives(surrogate: Surrogate, slope: Any) -> None:
    u = torch.tensor([0.2, 0.7, -1.4], dtype=DOUBLE, requires_grad=True)
    (first,) = torch.autograd.grad(surrogate_round(u, surrogate, 0.1).sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), u)
    e = (u - u.round()).detach().requires_grad_()
    expected = 0.1 * (0.5 * torch.sin(torch.pi * e) if slope is torch.sin else e.abs())
    (slope_of_slope,) = torch.autograd.grad(expected.sum(), e)
    torch.testing.assert_close(first.detach(), 1 + expected.detach())
    torch.testing.assert_close(second, slope_of_slope)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("signed", [SIGNED, UNSIGNED])
def test_gradients_are_those_of_the_closed_forms(surrogate: Surrogate, signed: Tensor) -> None:  # check 4
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, generator=generator, dtype=DOUBLE).requires_grad_()
    g = torch.randn(40, generator=generator, dtype=DOUBLE)
    d = torch.tensor(0.13, dtype=DOUBLE, requires_grad=True)
    xmax = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True)
    u = in_codes(x, d, xmax, signed)
    found = torch.autograd.grad(d * surrogate_round(u, surrogate, 0.2), (x, d, xmax), g)

    u, e = u.detach(), (u - u.round()).detach()
    if surrogate in GRADIENT_DEPENDENT:
        slope = 1 + 0.2 * torch.sign(g * d.detach()) * slope_excess(e, surrogate)
    else:
        slope = {"ste": 1 + 0 * e, "acos": 1 + 0.1 * torch.sin(torch.pi * e), "psgd": 1 + 0.2 * e.abs()}[surrogate]
    low = -float(signed) * 0.9
    outside = (x > 0.9).double() - float(signed) * (x < low).double()
    expected = (
        g * slope * ((x >= low) & (x <= 0.9)),
        (g * (u.round() - slope * u)).sum(),
        (g * slope * outside).sum(),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def test_inside_the_range_its_gradient_is_zero() -> None:  # check 4
    x = torch.linspace(-0.8, 0.8, 33, dtype=DOUBLE)
    quantizer = put(step_range(surrogate="ewgs", delta=0.1), 0.07, 0.9)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), quantizer.xmax)
    assert abs(float(gradient)) < 1e-13


def test_at_a_bound_the_gradient_is_half() -> None:
    x = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE, requires_grad=True)
    quantizer = put(step_range("input"), 0.1, 1.0)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 1.0, 0.5], dtype=DOUBLE))


@pytest.mark.parametrize(
    ("surrogate", "delta", "kind"),
    [("ewgs", 0.1, "gradient_dependent"), ("ewgs", 0.0, "surrogate"), ("psgd", 0.1, "surrogate")],
)
def test_a_quantizer_says_whether_it_has_a_hessian(surrogate: str, delta: float, kind: str) -> None:
    quantizer = put(step_range(surrogate=surrogate, delta=delta), 0.1, 0.7)
    assert quantizer.backward == kind
    quantizer.plain_ste = True
    x = torch.linspace(-0.65, 0.65, 20, dtype=DOUBLE).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(x), x, torch.linspace(-1, 1, 20, dtype=DOUBLE))
    torch.testing.assert_close(gradient, torch.linspace(-1, 1, 20, dtype=DOUBLE))


def test_the_slope_of_a_power_of_two_is_its_value_over_the_step() -> None:
    d = torch.tensor([0.043, 0.1, 0.25], dtype=DOUBLE, requires_grad=True)
    found = power_of_two_step(d)
    torch.testing.assert_close(found.detach(), torch.tensor([0.03125, 0.125, 0.25], dtype=DOUBLE))
    (gradient,) = torch.autograd.grad(found.sum(), d)
    torch.testing.assert_close(gradient, (found / d).detach())


# -- schedule and projection -----------------------------------------------------------------------------------


def test_the_penalty_rises_over_half_of_the_search() -> None:  # check 8
    assert [ramp(part, 0.5) for part in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.01, 0.505, 1.0, 1.0])


def test_a_projected_step_is_below_its_range_and_both_within_limits() -> None:  # check 7
    generator = torch.Generator().manual_seed(5)
    steps, ranges = STEPS["weight"], RANGES
    d, xmax = (torch.exp(4 * torch.randn(500, generator=generator, dtype=DOUBLE)) for _ in range(2))
    new_d, new_xmax = projected(d, xmax, steps, ranges)
    assert bool(((new_d > steps[0]) & (new_d < steps[1])).all())
    assert bool(((new_xmax > ranges[0]) & (new_xmax < ranges[1])).all())
    inside = (d > steps[0]) & (d < steps[1]) & (xmax > ranges[0]) & (xmax < ranges[1])
    assert bool((new_d < new_xmax)[inside].all())
    ordered = inside & (d < xmax - GAP) & (xmax < ranges[1] - GAP) & (d > steps[0] + GAP) & (d < steps[1] - GAP)
    assert bool((new_d == d)[ordered].all()) and bool((new_xmax == xmax)[ordered].all()) and int(ordered.sum()) > 50


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_no_width_above_eight_bits_is_left(role: Role, power_of_two: bool) -> None:
    for d, xmax in ((1e-6, 0.4), (3e-4, 120.0), (0.01, 1.9), (1e-3, 0.36)):
        quantizer = put(step_range(role, power_of_two=power_of_two), d, xmax)
        quantizer.project()
        assert float(quantizer.bits) <= 8
    quantizer = put(step_range(role, power_of_two=power_of_two), 0.5, 0.1)
    quantizer.project()
    assert bool(quantizer.d < quantizer.xmax) and float(quantizer.bits) >= quantizer.floor


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("role", "xmax"), [("weight", 0.4), ("weight", 5.0), ("input", 0.4), ("input", 100.0)])
def test_a_coarser_step_has_the_width_and_the_others_stay(role: Role, xmax: float, power_of_two: bool) -> None:
    quantizer = put(step_range(role, power_of_two=power_of_two), xmax / 100, xmax)
    before = quantizer.d.clone(), quantizer.xmax.clone()
    quantizer.coarsen(torch.tensor(8.0, dtype=DOUBLE))
    assert torch.equal(quantizer.d, before[0]) and torch.equal(quantizer.xmax, before[1])
    for bits in range(7, quantizer.floor - 1, -1):
        quantizer.coarsen(torch.tensor(float(bits), dtype=DOUBLE))
        assert float(quantizer.bits) == bits


def test_calibration_of_nothing_but_zeros() -> None:
    for role in ("weight", "input"):
        quantizer = step_range(role)
        quantizer.initialise(torch.zeros(3, 3, dtype=DOUBLE))
        assert quantizer.xmax.tolist() == 2**-4
        assert float(quantizer.bits) == 4
    sliced = step_range(shape=(1, 1, 2, 3))
    x = torch.ones(1, 1, 2, 3, dtype=DOUBLE)
    x[..., 1] = 0
    sliced.initialise(x)
    assert sliced.xmax.flatten().tolist() == [1, 1, 1]
