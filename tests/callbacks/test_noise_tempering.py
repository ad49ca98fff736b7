import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.noise_tempering import NoiseTempering, TemperedLSQ, noise
from callbacks.noise_tempering.mechanic import noise_strength
from callbacks.noise_tempering.quantizer import Tempering
from research.quant.fused import Kernels
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.ewgs import ewgs_round
from research.quant.quantizers.lsq import LSQ, lsq_gradient_factor
from tests.callbacks.tempered import TARGET, close, tempered
from tests.learning.tiny import fit, make_module

Golden = dict[str, np.ndarray]


@pytest.fixture
def vectors(golden: Callable[[str], Golden]) -> Golden:
    return golden("noise_tempering")


def fixed_draws(monkeypatch: pytest.MonkeyPatch, u: np.ndarray) -> None:
    """Let `draw` find ``u`` as its uniform numbers in (-1, 1)."""
    monkeypatch.setattr(noise, "uniform_like", lambda like: torch.from_numpy(u))


# -- golden vectors ------------------------------------------------------------------------------------------------


def test_golden_ewgs_discretizer(vectors: Golden) -> None:
    for levels in vectors["ewgs_levels"]:
        for index, delta in enumerate(vectors["ewgs_deltas"]):
            x = torch.tensor(vectors["ewgs_x"], requires_grad=True)
            n = int(levels) - 1
            out = ewgs_round(x * n, torch.tensor(delta / n)) / n
            out.backward(torch.from_numpy(vectors["ewgs_gout"]))
            close(out, vectors[f"ewgs_out_L{levels}"])
            assert x.grad is not None
            close(x.grad, vectors[f"ewgs_gx_L{levels}_d{index}"])


@pytest.mark.parametrize("kernels", [None, "eager"], ids=["reference", "one function"])
def test_golden_reconstruction(vectors: Golden, monkeypatch: pytest.MonkeyPatch, kernels: Kernels | None) -> None:
    fixed_draws(monkeypatch, vectors["nt_u"])
    values = torch.from_numpy(vectors["nt_v"])
    for index, strength in enumerate(vectors["nt_lams"]):
        quantizer = tempered(
            values, int(vectors["nt_bits"]), float(vectors["nt_s"]), float(strength), delta=float(vectors["nt_delta"])
        )
        quantizer.kernels = kernels
        assert quantizer.in_one_function == (kernels is not None)
        assert [float(limit) for limit in quantizer.limits()] == [-vectors["nt_Qn"], vectors["nt_Qp"]]
        v = values.clone().requires_grad_()
        out = quantizer(v)
        out.backward(torch.from_numpy(vectors["nt_gout"]))
        close(out, vectors[f"nt_out_{index}"])
        assert v.grad is not None and quantizer.raw_scale.grad is not None and quantizer.delta.grad is not None
        close(v.grad, vectors["nt_gv"])
        close(quantizer.raw_scale.grad, vectors["nt_gs"])
        close(quantizer.delta.grad, vectors["nt_gdelta"])
        close(quantizer.eval()(values), vectors["nt_q"])


def test_golden_error_and_gradient_factor(vectors: Golden) -> None:
    values, upstream = torch.from_numpy(vectors["nt_v"]), torch.from_numpy(vectors["nt_gout"])
    bits, scale = int(vectors["nt_bits"]), float(vectors["nt_s"])
    source = LSQ(QuantizerSpec(bits=bits), values.shape, None, "weight", gradient_factor=False)
    unscaled = TemperedLSQ(source, Tempering(noise_dist="one")).double()
    unscaled.raw_scale.data.fill_(scale)
    unscaled.strength.fill_(1.0)
    out = unscaled(values)
    close(out - unscaled.eval()(values), vectors["nt_err"])
    out.backward(upstream)
    assert unscaled.raw_scale.grad is not None and unscaled.delta.grad is not None
    factor = lsq_gradient_factor(values.numel(), unscaled.limits()[1].double())
    close(factor, vectors["nt_gn"])
    close(factor * unscaled.raw_scale.grad, vectors["nt_gs"])
    close(factor * unscaled.delta.grad, vectors["nt_gdelta"])


def test_golden_schedules(vectors: Golden) -> None:
    total, kappa, start = int(vectors["sched_T"]), float(vectors["sched_k"]), float(vectors["sched_lam0"])
    geometric = NoiseTempering(lambda_0=start, lambda_final=float(vectors["sched_lamT"])).kappa
    for name, decay in (("sched_exp", kappa), ("sched_geom", geometric)):
        found = [noise_strength(step, total, start, decay) for step in range(total + 1)]
        np.testing.assert_allclose(found, vectors[name], rtol=1e-12)


class Quadratic:
    """``w'Hw/2 + b'w`` of the golden file, and its tempered quantizer."""

    def __init__(self, vectors: Golden) -> None:
        self.hessian, self.linear, self.w = (torch.from_numpy(vectors[f"quad_{name}"]) for name in ("H", "b", "w"))
        self.scale, self.strength = float(vectors["quad_s"]), float(vectors["quad_lam"])

    def loss(self, w: Tensor) -> Tensor:
        return ((w @ self.hessian) * w).sum(-1) / 2 + w @ self.linear

    def samples(self, dist: Any, count: int) -> Tensor:
        values = self.w.expand(count, -1)
        return tempered(values, 3, self.scale, self.strength, noise_dist=dist, delta_learn="fixed")(values)

    @property
    def quantized(self) -> Tensor:
        return tempered(self.w, 3, self.scale).eval()(self.w)


def test_golden_quadratic_has_an_error_weighted_trace_as_penalty(vectors: Golden) -> None:
    """Cheap check 4."""
    torch.manual_seed(0)
    job, count = Quadratic(vectors), 400_000
    close(job.loss(job.quantized), vectors["quad_Lq"])
    close(job.loss(job.samples("one", 1))[0], vectors["quad_EL_u1"])
    error = job.w.clamp(-4 * job.scale, 3 * job.scale) - job.quantized
    trace_term = job.strength**2 / 6 * (error.square() * job.hessian.diagonal()).sum()
    close(trace_term, vectors["quad_trace_term"])
    blind_term = job.strength**2 * job.scale**2 / 24 * job.hessian.trace()
    for dist, expected in (("uniform", trace_term), ("blind", blind_term)):
        losses = job.loss(job.samples(dist, count)) - job.loss(job.quantized)
        assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(count)
        assert losses.std() / math.sqrt(count) < 0.1 * expected, "enough samples to tell"


def test_golden_mean_over_the_noise_of_a_quadratic(vectors: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """All corners of +-1/sqrt(3) have the mean and the variances of U(-1, 1): of a quadratic, its exact mean."""
    job = Quadratic(vectors)
    corners = np.array(list(product((-1.0, 1.0), repeat=len(job.w)))) / math.sqrt(3)
    fixed_draws(monkeypatch, corners)
    close(job.loss(job.samples("uniform", len(corners))).mean(), vectors["quad_EL"])


# -- the fast form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta_learn", ["carrier", "fixed", "hessian"])
@pytest.mark.parametrize("noise_dist", ["uniform", "one", "bernoulli", "gauss", "blind"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_one_function_equals_the_composition(granularity: Any, noise_dist: Any, delta_learn: Any) -> None:
    values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upstream = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    source = LSQ(QuantizerSpec("lsq", 3, True, granularity=granularity, init="mse"), values.shape, 0, "weight")
    source.initialise(values)
    quantizer = TemperedLSQ(source, Tempering(noise_dist=noise_dist, delta=0.3, delta_learn=delta_learn)).double()
    quantizer.strength.fill_(0.7)
    learned = [quantizer.raw_scale, *([quantizer.delta] if delta_learn == "carrier" else [])]

    def results(kernels: Kernels | None) -> tuple[Tensor, ...]:
        quantizer.kernels = kernels
        torch.manual_seed(2)
        v = values.clone().requires_grad_()
        out = quantizer(v)
        return out, *torch.autograd.grad(out, [v, *learned], upstream)

    (out, *gradients), (expected, *reference) = results("traced"), results(None)
    assert torch.equal(out, expected)
    for found, wanted in zip(gradients, reference, strict=True):
        close(found, wanted)


def test_one_function_has_no_second_derivatives_and_says_so() -> None:
    quantizer = tempered(torch.randn(3, 4))
    quantizer.kernels = "eager"
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(quantizer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("switches", [{"noise_site": "grad"}, {"grad_scale": "scalar"}, {"delta_learn": "shared"}])
def test_switches_that_the_function_does_not_know_take_the_composition(switches: dict[str, Any]) -> None:
    quantizer = tempered(torch.randn(3, 4), **switches)
    quantizer.kernels = "traced"
    assert not quantizer.in_one_function


def test_uniform_numbers_are_even_symmetric_and_lie_as_their_model_does() -> None:
    torch.manual_seed(0)
    like = torch.empty(16, 3, 37, 5).contiguous(memory_format=torch.channels_last)
    u = noise.uniform_like(like)
    assert (u.shape, u.stride(), u.dtype) == (like.shape, like.stride(), like.dtype)
    u = noise.uniform_like(torch.empty(400_001, dtype=torch.float64))
    assert u.abs().max() < 1 and float(u.abs().min()) > 0
    assert noise.uniform_like(torch.empty(100_000)).abs().max() <= 1
    counts = torch.histc(u, 64, -1, 1)
    chi_square = ((counts - len(u) / 64).square() / (len(u) / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    assert abs(u[:-1] @ u[1:]) / len(u) < 5 / 3 / math.sqrt(len(u)), "neighbours come from one draw"


# -- cheap checks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_check_1_without_noise_and_delta_it_is_lsq_bit_for_bit(bits: int) -> None:
    torch.manual_seed(bits)
    values, upstream = torch.randn(2, 6, 50)
    found = []
    source = LSQ(QuantizerSpec(bits=bits, init="mse"), values.shape, None, "weight")
    source.initialise(values)
    off = TemperedLSQ(source, Tempering(noisy=False, delta=0.0, delta_learn="fixed"))
    for quantizer in (source, off, TemperedLSQ(source, Tempering(delta=0.0, delta_learn="carrier"))):
        v = values.clone().requires_grad_()
        out = quantizer(v)
        out.backward(upstream)
        found.append((out.detach(), v.grad, quantizer.raw_scale.grad))
    for other in found[1:]:  # the last one has a strength of 0 and draws noise
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for strength in (0.0, 0.5, 1.0):
        off.strength.fill_(strength)
        assert torch.equal(off.eval()(values), source(values))


@pytest.mark.parametrize("dist", ["uniform", "one", "bernoulli", "gauss", "blind"])
def test_check_2_noise_stays_within_the_error(dist: Any) -> None:
    torch.manual_seed(0)
    on_grid, beyond = 0.2 * torch.arange(-4, 4).double(), torch.tensor([-5.0, 5.0]).double()
    values = torch.cat([torch.randn(4000, dtype=torch.float64), on_grid, beyond])
    strength = 0.7
    quantizer = tempered(values, strength=strength, noise_dist=dist)
    with torch.no_grad():
        moved = (quantizer(values) - quantizer.eval()(values)).abs()
        error = (values.clamp(-0.8, 0.6) - quantizer(values)).abs()
    bounded = bool((moved <= strength * error + 1e-12).all())
    assert bounded is (dist in ("uniform", "one", "bernoulli")), "gauss and blind break the bound"
    if dist != "blind":
        assert bool((moved[-10:] <= 1e-12).all()), "nothing moves on the grid or beyond the clip"
    else:
        assert bool((moved <= strength * 0.1 + 1e-12).all()) and bool((moved[-2:] > 0).all())


def test_check_2_full_strength_one_is_the_clipped_value() -> None:
    values = torch.randn(1000, dtype=torch.float64)
    close(tempered(values, noise_dist="one")(values), values.clamp(-0.8, 0.6))


def exponential(strengths: list[float]) -> bool:
    """Whether they fall, and their logarithm on a line."""
    steps = np.diff(np.log(strengths))
    return bool((steps < 0).all() and np.ptp(steps) < 1e-12)


def test_check_3_the_schedule_is_exponential() -> None:
    total, start, kappa = 50, 0.8, 3.0
    strengths = [noise_strength(step, total, start, kappa) for step in range(total + 1)]
    assert exponential(strengths)
    assert (strengths[0], strengths[-1]) == pytest.approx((start, start * math.exp(-kappa)))


def test_check_7_linear_annealing_between_the_same_ends_fails_check_3() -> None:
    assert not exponential(list(np.linspace(0.8, 0.8 * math.exp(-3.0), 51)))


def test_check_3_the_host_sets_it_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module({"noise_tempering": {"_target_": TARGET, "kappa": 2.0}})
    seen = []
    original = TemperedLSQ.fake_quantize

    def spy(self: TemperedLSQ, x: Tensor, rounding: bool = True) -> Tensor:
        if self.training and self.role == "weight":
            seen.append(float(self.strength))
        return original(self, x, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TemperedLSQ, "fake_quantize", spy)
        trainer = fit(module)
    assert seen[::2] == pytest.approx([noise_strength(step, 8, 1.0, 2.0) for step in range(8)])
    assert seen[::2] == seen[1::2]
    assert float(trainer.callback_metrics["noise_tempering/strength"]) == pytest.approx(seen[-1])
    assert "noise of strength 0.135 remains" in caplog.text


def test_check_5_gradients_grow_where_error_and_gradient_agree() -> None:
    torch.manual_seed(0)
    delta = 0.6
    values, upstream = torch.randn(2, 500, dtype=torch.float64)
    values[:3] = torch.tensor([0.2, -0.4, 0.0], dtype=torch.float64)
    quantizer = tempered(values, delta=delta, strength=0.0)
    v = values.clone().requires_grad_()
    quantizer(v).backward(upstream)
    inside = (values >= -0.8) & (values <= 0.6)
    assert v.grad is not None and bool((v.grad[~inside] == 0).all())
    ratio = (v.grad / upstream)[inside]
    error = (values - quantizer.eval()(values))[inside]
    agree = torch.sign(error) * torch.sign(upstream[inside])
    on_grid = error.abs() < 1e-12
    assert bool((ratio[(agree > 0) & ~on_grid] > 1).all()) and bool((ratio[(agree < 0) & ~on_grid] < 1).all())
    close(ratio[on_grid], torch.ones(3))
    assert float(ratio.min()) >= 1 - delta / 2 - 1e-12 and float(ratio.max()) <= 1 + delta / 2 + 1e-12


def test_check_6_noise_is_fresh_in_training_and_absent_in_evaluation() -> None:
    torch.manual_seed(0)
    values = torch.randn(2000, dtype=torch.float64)
    weight, inputs = tempered(values), tempered(values, role="input")
    with torch.no_grad():
        one, two = (quantizer(values) - quantizer.plain()(values) for quantizer in (weight, inputs))
        for quantizer in (weight, inputs):
            assert not torch.equal(quantizer(values), quantizer(values))
            quantizer.eval()
            assert torch.equal(quantizer(values), quantizer(values))
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.1


def test_check_6_gradient_variance_goes_with_the_square_of_the_strength(vectors: Golden) -> None:
    torch.manual_seed(0)
    job = Quadratic(vectors)
    variance = []
    for strength in (0.2, 0.4):
        job.strength = strength
        gradients = job.samples("uniform", 4000) @ job.hessian + job.linear
        variance.append(float(gradients.var(0).sum()))
    assert variance[1] / variance[0] == pytest.approx(4, rel=0.1)
