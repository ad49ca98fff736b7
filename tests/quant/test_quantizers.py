"""What each paper promises of its quantizer: exact small examples."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from research.quant.output_scale import OutputScale
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.base import Quantizer
from research.quant.quantizers.ewgs import ewgs_round
from research.quant.quantizers.lsq import lsq_gradient_factor
from research.quant.ranges import quantization_error


def make(name: str, bits: int, role: str = "input", shape: tuple[int, ...] = (), **fields: object) -> Quantizer:
    axis = 0 if role == "weight" else None
    return build_quantizer(QuantizerSpec(name=name, bits=bits, **fields), shape, axis, role).double()


def lsq(bits: int, scale: float, role: str = "input", **options: object) -> Quantizer:
    quantizer = make("lsq", bits, role, options=options)
    quantizer.raw_scale.data.fill_(scale)
    return quantizer


def run(quantizer: Quantizer, x: Tensor, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and gradient of `x`; the quantizer's parameters get theirs anew."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x)
    (out * upstream).sum().backward()
    return out.detach(), x.grad


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_lsq_by_hand() -> None:
    v = double(-0.9, -0.28, 0.05, 0.26, 0.8)
    for factor, expected in ((False, 0.15), (True, 0.15 / math.sqrt(5))):
        quantizer = lsq(2, 0.2, "weight", gradient_factor=factor)
        out, grad = run(quantizer, v)
        torch.testing.assert_close(out, double(-0.4, -0.2, 0.0, 0.2, 0.2))
        assert torch.equal(grad, double(0, 1, 1, 0, 0))
        assert quantizer.raw_scale.grad.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("value", "expected"), [(1.49, -0.49), (1.51, 0.49), (10.0, 3.0), (3.0, 0.0), (-1.0, 0.0)])
def test_lsq_step_gradient_is_a_saw_tooth(value: float, expected: float) -> None:
    quantizer = lsq(2, 1.0, gradient_factor=False)
    run(quantizer, double(value))
    assert quantizer.raw_scale.grad.item() == pytest.approx(expected, abs=1e-12)


def test_lsq_round_first_mask_is_half_a_step_wider() -> None:
    x = double(3.2, 3.6, -0.4, -0.6)  # codes 0 .. 3
    for mask, expected in (("clip_first", double(0, 0, 0, 0)), ("round_first", double(1, 0, 1, 0))):
        out, grad = run(lsq(2, 1.0, mask=mask), x)
        assert torch.equal(out, double(3, 3, 0, 0))
        assert torch.equal(grad, expected)


def test_lsq_scale_equivariance() -> None:
    x, upstream = torch.randn(2, 50, dtype=torch.float64)
    one, other = lsq(3, 0.25, "weight"), lsq(3, 0.25 * 4, "weight")
    assert torch.equal(run(other, 4 * x, upstream)[0], 4 * run(one, x, upstream)[0])
    assert torch.equal(one.codes(x), other.codes(4 * x))
    torch.testing.assert_close(one.raw_scale.grad, other.raw_scale.grad)


def test_lsq_gradient_factor_leaves_the_values_and_counts_the_elements() -> None:
    x = torch.randn(40, dtype=torch.float64)
    quantizer = lsq(3, 0.3, "weight")
    out, _ = run(quantizer, x)
    once = quantizer.raw_scale.grad.clone()
    assert torch.equal(out, lsq(3, 0.3, "weight", gradient_factor=False)(x))
    run(quantizer, torch.cat([x, x]))
    torch.testing.assert_close(quantizer.raw_scale.grad, math.sqrt(2) * once)


def test_lsq_can_leave_the_batch_out_of_the_count() -> None:
    x = torch.rand(8, 10, dtype=torch.float64)
    with_batch, without = lsq(2, 0.2), lsq(2, 0.2, count_batch=False)
    run(with_batch, x)
    run(without, x)
    torch.testing.assert_close(without.raw_scale.grad, math.sqrt(8) * with_batch.raw_scale.grad)


def test_lsq_step_stays_positive() -> None:
    quantizer = lsq(3, -0.25)
    assert quantizer.scale == 0.25
    quantizer.raw_scale.data.zero_()
    assert quantizer.scale > 0


def test_lsq_plus_without_offset_is_lsq() -> None:
    x, upstream = torch.randn(2, 60, dtype=torch.float64)
    reference = lsq(3, 0.25)
    expected = (*run(reference, x, upstream), reference.raw_scale.grad)
    for configuration in ("C1", "C4"):
        quantizer = make("lsq_plus", 3, options={"configuration": configuration})
        quantizer.raw_scale.data.fill_(0.25)
        for actual, value in zip((*run(quantizer, x, upstream), quantizer.raw_scale.grad), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-13, atol=1e-13)


def test_lsq_plus_golden_gradient_factor(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    prefix = "lsqplus_a4_"
    case = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden("lsq").items() if k.startswith(prefix)}
    quantizer = make("lsq_plus", 4, options={"configuration": "C3", "gradient_factor": False})
    quantizer.raw_scale.data.copy_(case["s"].squeeze())
    quantizer.raw_offset.data.copy_(case["beta"].squeeze())
    run(quantizer, case["v"], case["upstream"])
    for name, parameter in (("grad_s", quantizer.raw_scale), ("grad_beta", quantizer.raw_offset)):
        torch.testing.assert_close(case["gradscale"] * parameter.grad, case[name].squeeze(), rtol=1e-8, atol=0)
    factor = lsq_gradient_factor(case["v"].numel(), quantizer.limits()[1].double())
    torch.testing.assert_close(factor, case["gradscale"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("offset", ["real", "integer"])
def test_lsq_plus_offset_gradient_comes_from_clipped_elements_only(offset: str) -> None:
    quantizer = make("lsq_plus", 4, options={"offset": offset, "gradient_factor": False})
    quantizer.raw_scale.data.fill_(0.1)
    quantizer.raw_offset.data.fill_(-0.25 if offset == "real" else 3.0)
    run(quantizer, torch.linspace(-0.2, 1.1, 20, dtype=torch.float64))
    assert abs(quantizer.raw_offset.grad.item()) < 1e-12
    run(quantizer, double(0.5, 9.0, 9.0, -9.0))
    expected = 3.0 if offset == "real" else -3 * 0.1  # d x_hat / d beta = 1; d x_hat / d z = -s
    assert quantizer.raw_offset.grad.item() == pytest.approx(expected, abs=1e-12)


def test_lsq_plus_initialisation_minimises_the_error() -> None:
    x = torch.nn.functional.silu(3 * torch.randn(2000, dtype=torch.float64)) + 1.3
    real = make("lsq_plus", 2, init="mse")
    real.initialise(x)
    error = (real(x) - x).square().mean()
    qmin, qmax = real.limits()
    for scale in torch.linspace(0.5, 2.0, 16) * real.scale.detach():
        for offset in real.raw_offset.detach() + torch.linspace(-0.5, 0.5, 11) * scale:
            moved = quantization_error(x - offset, scale, torch.zeros(()), qmin, qmax)
            assert moved >= error - 1e-3
    fixed = make("lsq_plus", 2, init="minmax")
    fixed.initialise(x)
    assert error < (fixed(x) - x).square().mean()


def test_lsq_plus_rejects_bad_options() -> None:
    for fields, words in (
        ({"options": {"configuration": "C5"}}, "C1, C2, C3, C4"),
        ({"options": {"offset": "half"}}, "real or integer"),
        ({"signed": True, "options": {"configuration": "C4"}}, "use auto"),
        ({"options": {"mask": "both"}}, "clip_first or round_first"),
    ):
        with pytest.raises(ValueError, match=words):
            make("lsq_plus", 4, **fields)


def test_pact_by_hand() -> None:
    quantizer = make("pact", 2, options={"alpha": 2.0})
    out, grad = run(quantizer, double(-1, 0.4, 1.5, 3))
    torch.testing.assert_close(out, double(0, 2 / 3, 4 / 3, 2))
    torch.testing.assert_close(grad, double(0, 1, 1, 0))
    torch.testing.assert_close(quantizer.alpha.grad, double(1.0)[0])
    assert "alpha" not in quantizer.parameter_options  # alpha is decayed as the paper's loss term has it


def test_pact_of_signed_inputs_clips_on_both_sides() -> None:
    quantizer = make("pact", 3, options={"alpha": 1.5})
    quantizer.initialise(double(-1, 1))
    out, grad = run(quantizer, double(-9, -0.6, 0.4, 9), double(1, 1, 1, 3))
    torch.testing.assert_close(out, double(-1.5, -0.5, 0.5, 1.5))
    torch.testing.assert_close(grad, double(0, 1, 1, 0))
    torch.testing.assert_close(quantizer.alpha.grad, double(2.0)[0])


def test_pact_rejects_clips_on_the_wrong_side() -> None:
    with pytest.raises(ValueError, match="lower < 0 < alpha"):
        make("pact", 4, options={"lower": 1.0})


def test_dorefa_weights_by_hand() -> None:
    quantizer = make("dorefa", 2, "weight")
    out, _ = run(quantizer, double(-1, 0.2, 1))
    torch.testing.assert_close(out, double(-1, 1 / 3, 1))
    assert quantizer.codes(double(-1, 0.2, 1)).tolist() == [-3, 1, 3]
    assert (quantizer(double(0.0, 1.0)).abs() > 0.3).all()  # no level at zero
    torch.testing.assert_close(quantizer(double(-10, 2, 10)), double(-1, 1, 1))  # tanh 2 = 0.964


def test_dorefa_gradient_flows_through_tanh_and_the_maximum() -> None:
    w = torch.randn(12, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(12, dtype=torch.float64)
    (make("dorefa", 4, "weight")(w) * upstream).sum().backward()
    t = torch.tanh(w)
    (expected,) = torch.autograd.grad((t / t.abs().max() * upstream).sum(), w)
    torch.testing.assert_close(w.grad, expected)


def test_dorefa_signs_of_the_gradient_do_not_depend_on_the_size_of_the_upstream() -> None:
    w = double(-1, 0.2, 1, 0.4)
    quantizer, upstream = make("dorefa", 2, "weight"), double(0.5, -2, 1, -0.1)
    once = run(quantizer, w, upstream)[1]
    for factor in (1e-3, 7.0):
        scaled = run(quantizer, w, factor * upstream)[1]
        assert torch.equal(scaled.sign(), once.sign()) and once.all()
        torch.testing.assert_close(scaled, factor * once, rtol=1e-12, atol=0)


def test_dorefa_binary_weights() -> None:
    w = double(-0.5, 0.25, 0.0, 1.25)
    quantizer = make("dorefa", 1, "weight")
    out, grad = run(quantizer, w, double(1, 2, 3, 4))
    assert torch.equal(out, double(-0.5, 0.5, 0.5, 0.5))
    torch.testing.assert_close(grad, double(1, 2, 3, 4))
    assert torch.equal(quantizer.codes(w), torch.tensor([-1, 1, 1, 1], dtype=torch.int32))
    assert quantizer.scale == 0.5


def test_dorefa_inputs() -> None:
    quantizer = make("dorefa", 2)
    out, grad = run(quantizer, double(-0.5, 0.3, 1.0, 1.5))
    torch.testing.assert_close(out, double(0, 1 / 3, 1, 1))
    assert torch.equal(grad, double(0, 1, 1, 0))
    quantizer.initialise(double(-1, 1))
    torch.testing.assert_close(quantizer(double(-3, -0.4, 0.6)), double(-1, 0, 1))


def test_ewgs_rounding_by_hand() -> None:
    n, delta = 3, 0.3
    for g, expected in ((2.0, 2.04), (-2.0, -1.96)):
        x = double(0.4).requires_grad_()
        x_q = ewgs_round(x * n, double(delta)[0] / n) / n
        x_q.backward(double(g))
        torch.testing.assert_close(x_q.detach(), double(1 / 3))
        torch.testing.assert_close(x.grad, double(expected))


def test_ewgs_without_delta_is_the_plain_estimator() -> None:
    x, upstream = torch.rand(2, 30, dtype=torch.float64)
    for role in ("weight", "input"):
        quantizer = make("ewgs", 2, role)
        results = []
        for delta, plain in ((0.0, False), (0.2, True), (0.2, False)):
            quantizer.delta.fill_(delta)
            quantizer.plain_ste = plain
            results.append(run(quantizer, x, upstream))
        assert all(torch.equal(out, results[0][0]) for out, _ in results)
        assert torch.equal(results[0][1], results[1][1])
        assert not torch.allclose(results[0][1], results[2][1])


def test_ewgs_initialisation() -> None:
    x = torch.randn(500, dtype=torch.float64)
    weights, inputs = make("ewgs", 2, "weight"), make("ewgs", 2)
    weights.initialise(x)
    inputs.initialise(x.relu())
    torch.testing.assert_close(weights.upper.detach(), 3 * x.std())
    torch.testing.assert_close(weights.lower.detach(), -3 * x.std())
    assert inputs.lower == 0
    torch.testing.assert_close(inputs.upper.detach(), 3 * x.relu().std() / math.sqrt(1 - 2 / math.pi))


def test_mid_rise_grids_reject_what_they_would_ignore() -> None:
    for name, fields in (("dorefa", {"narrow": True}), ("pact", {"signed": False}), ("ewgs", {"narrow": True})):
        with pytest.raises(ValueError, match="use signed=(true|auto), narrow=false"):
            make(name, 4, "weight", **fields)
    with pytest.raises(ValueError, match="delta=-0.1"):
        make("ewgs", 4, options={"delta": -0.1})
    assert make("ewgs", 4, options={"delta": 0.25}).delta == 0.25


def test_output_scale_restores_the_mean_magnitude() -> None:
    output, quantized = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    scale = OutputScale().double()
    scale.initialise(output, quantized)
    torch.testing.assert_close(scale(quantized).abs().mean(), output.abs().mean())


def test_minmax_range_holds_at_every_width() -> None:
    x = double(-1.5, 0.0, 1.0)
    quantizer = make("minmax", 8, "weight", init="minmax")
    quantizer.initialise(x)
    torch.testing.assert_close(quantizer.scale, double(1.5 / 127.5)[0])
    quantizer.bits = torch.tensor(4.0)
    torch.testing.assert_close(quantizer.scale, double(1.5 / 7.5)[0])
    narrow = make("minmax", 8, "weight", init="minmax", narrow=True)
    narrow.initialise(x)
    torch.testing.assert_close(narrow.scale, double(1.5 / 127)[0])


def test_minmax_asymmetric_represents_zero_and_the_whole_range() -> None:
    x = torch.linspace(-0.7, 2.1, 101, dtype=torch.float64)
    quantizer = make("minmax", 4, init="minmax", options={"symmetric": False})
    quantizer.initialise(x)
    assert quantizer.zero_point == quantizer.codes(double(0.0))
    assert (quantizer.codes(x).min(), quantizer.codes(x).max()) == (0, 15)
    assert (quantizer(x) - x).abs().max() <= quantizer.scale * 0.75
    assert quantizer(double(0.0)) == 0


def test_a_narrow_input_keeps_all_unsigned_codes() -> None:
    for x, limits in ((double(0.0, 2.0), (0, 15)), (double(-1.0, 2.0), (-7, 7))):
        quantizer = make("minmax", 4, init="minmax", narrow=True)
        quantizer.initialise(x)
        assert quantizer.limits() == limits and quantizer.grid.limits(quantizer.bits) == limits
        assert quantizer.codes(double(-9.0, 9.0)).tolist() == list(limits)


@pytest.mark.parametrize("name", ["dorefa", "pact"])
def test_without_bits_the_relaxed_value_is_zero_too(name: str) -> None:
    quantizer = make(name, 0)
    quantizer.mode = "relax"
    out, grad = run(quantizer, double(-1.0, 0.5, 99.0))
    assert out.abs().sum() == 0 and grad.abs().sum() == 0
    assert all(parameter.grad == 0 for parameter in quantizer.parameters())


def test_minmax_power_of_two_scale() -> None:
    x = torch.randn(100, dtype=torch.float64)
    for symmetric in (True, False):
        options = {"power_of_two": True, "symmetric": symmetric}
        quantizer = make("minmax", 8, "weight", init="minmax", options=options)
        quantizer.initialise(x)
        assert torch.log2(quantizer.scale).frac() == 0
        assert (quantizer(x) - x).abs().max() < 0.31 * x.abs().max()  # the range shrinks by sqrt(2) at most
