import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from callbacks.noise_tempering import NoiseTempering, TemperedLSQ
from callbacks.noise_tempering.mechanic import noise_strength
from callbacks.noise_tempering.quantizer import DISTRIBUTIONS, Tempering, draw, error_aware_gradient
from research.learning.finalise import finalise
from research.quant.layers import quantizers
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.ewgs import ewgs_round
from research.quant.quantizers.lsq import LSQ
from tests.learning.tiny import LSQ as RECIPE
from tests.learning.tiny import fit, float_weights, make_module, state, tiny_net

Golden = dict[str, np.ndarray]
TARGET = "callbacks.noise_tempering.NoiseTempering"


@pytest.fixture
def vectors(golden: Callable[[str], Golden]) -> Golden:
    return golden("noise_tempering")


def tempered(values: Tensor, bits: int = 3, scale: float = 0.2, strength: float = 1.0, **switches: Any) -> TemperedLSQ:
    """A float64 weight quantizer in training with the given step."""
    source = LSQ(QuantizerSpec(bits=bits), values.shape, None, "weight")
    quantizer = TemperedLSQ(source, Tempering(**switches)).double()
    with torch.no_grad():
        quantizer.raw_scale.fill_(scale)
        quantizer.delta.fill_(switches.get("delta", 0.2))
    quantizer.strength.fill_(strength)
    return quantizer


def fixed_draws(monkeypatch: pytest.MonkeyPatch, u: np.ndarray) -> None:
    """Let `draw` find ``u`` as its uniform numbers in (-1, 1)."""
    monkeypatch.setattr(torch, "rand_like", lambda like: (torch.from_numpy(u) + 1) / 2)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-10, atol=1e-12)


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


def test_golden_reconstruction(vectors: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, vectors["nt_u"])
    values = torch.from_numpy(vectors["nt_v"])
    for index, strength in enumerate(vectors["nt_lams"]):
        quantizer = tempered(
            values, int(vectors["nt_bits"]), float(vectors["nt_s"]), float(strength), delta=float(vectors["nt_delta"])
        )
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


def test_check_3_the_schedule_is_exponential() -> None:
    total, start, kappa = 50, 0.8, 3.0
    logs = np.log([noise_strength(step, total, start, kappa) for step in range(total + 1)])
    assert math.exp(logs[0]) == pytest.approx(start)
    assert bool((np.diff(logs) < 0).all())
    np.testing.assert_allclose(np.diff(logs, 2), 0, atol=1e-12)
    assert logs[-1] == pytest.approx(math.log(start) - kappa)


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
    weight, other = tempered(values), tempered(values)
    with torch.no_grad():
        assert not torch.equal(weight(values), weight(values))
        one, two = (quantizer(values) - quantizer.plain()(values) for quantizer in (weight, other))
        weight.eval()
        assert torch.equal(weight(values), weight(values))
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


# -- switches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", [dist for dist in DISTRIBUTIONS if dist != "one"])
def test_every_distribution_has_its_mean_and_variance(dist: Any) -> None:
    torch.manual_seed(0)
    u = draw(dist, torch.full((200_000,), 0.3), torch.tensor(0.8)) / (0.8 if dist == "blind" else 0.3)
    mean, variance = {
        "uniform": (0, 1 / 3),
        "bernoulli": (0.5, 0.25),
        "gauss": (0, 1 / 3),
        "blind": (0, 1 / 12),
    }[dist]
    assert float(u.mean()) == pytest.approx(mean, abs=0.01)
    assert float(u.var()) == pytest.approx(variance, rel=0.02)


def test_shared_scale_gets_the_true_gradient_of_the_noise() -> None:
    torch.manual_seed(0)
    values, upstream = torch.randn(2, 40, dtype=torch.float64)
    strength = 0.6
    quantizer = tempered(values, strength=strength, delta_learn="shared", delta=0.5)
    out = quantizer(values)
    out.backward(upstream)
    noise = out.detach() - quantizer.eval()(values)
    assert quantizer.delta.grad is not None
    factor = 1 / math.sqrt(40 * 3)
    close(quantizer.delta.grad, factor * (upstream * noise).sum() / 0.5)


def test_scalar_scale_multiplies_the_gradient() -> None:
    values, upstream = torch.randn(2, 40, dtype=torch.float64)
    gradients = []
    for delta in (1.0, 1.5):
        v = values.clone().requires_grad_()
        tempered(values, strength=0.0, grad_scale="scalar", delta=delta)(v).backward(upstream)
        assert v.grad is not None
        gradients.append(v.grad)
    close(gradients[1], 1.5 * gradients[0])


def test_noise_on_the_gradient_leaves_the_output_alone() -> None:
    torch.manual_seed(0)
    values, upstream = torch.randn(2, 5000, dtype=torch.float64)
    quantizer = tempered(values, noise_site="grad", delta=0.0)
    v = values.clone().requires_grad_()
    out = quantizer(v)
    out.backward(upstream)
    assert torch.equal(out, quantizer.eval()(values)) and v.grad is not None
    inside = (values >= -0.8) & (values <= 0.6)
    error = values - out.detach()
    u = (v.grad - upstream)[inside] / (upstream * inside).std() / error[inside]
    assert float(u.abs().max()) <= 1 + 1e-9
    assert float(u.var()) == pytest.approx(1 / 3, rel=0.05)
    assert bool((v.grad[~inside] == 0).all())


def test_noise_on_the_gradient_goes_with_a_scalar_scale() -> None:
    v = torch.randn(50, dtype=torch.float64, requires_grad=True)
    quantizer = tempered(v, noise_site="grad", grad_scale="scalar", delta=1.0)
    (one,) = torch.autograd.grad(quantizer(v).square().sum(), v)
    (two,) = torch.autograd.grad(quantizer(v).square().sum(), v)
    assert not torch.equal(one, two)


def test_error_aware_gradient_without_factor_is_the_identity() -> None:
    v = torch.randn(20, requires_grad=True)
    upstream = torch.randn(20)
    error_aware_gradient(v, torch.zeros(20)).backward(upstream)
    assert v.grad is not None and torch.equal(v.grad, upstream)


def test_the_hessian_rule_sets_delta_every_n_epochs() -> None:
    config = {
        "_target_": TARGET,
        "delta_learn": "hessian",
        "delta": 0.0,
        "hessian": {"every_n_epochs": 2, "batches": 1, "batch_size": 8, "probes": 4},
    }
    deltas = []
    for epochs in (2, 3):
        module = make_module({"noise_tempering": config})
        fit(module, max_epochs=epochs)
        deltas.append([float(quantizer.delta) for _, quantizer in quantizers(module.net)])
    assert deltas[0] == [0.0] * 4
    assert max(deltas[1]) > 0 and min(deltas[1]) >= 0 and max(deltas[1]) <= 2


# -- in the host ---------------------------------------------------------------------------------------------------


def test_it_learns_delta_within_its_bounds_and_leaves_lsq_behind(tmp_path: Path) -> None:
    model = tiny_net()
    weights = float_weights(tmp_path / "f.safetensors", model)
    module = make_module({"noise_tempering": {"_target_": TARGET, "delta": 2.0}}, model=model, checkpoint=weights)
    fit(module)
    found = dict(quantizers(module.net))
    assert all(type(quantizer) is TemperedLSQ for quantizer in found.values())
    deltas = torch.stack([quantizer.delta.detach() for quantizer in found.values()])  # type: ignore[misc]
    assert bool((deltas <= 2).all()) and bool((deltas != 2).any())
    final = finalise(module)["final"]
    assert {type(quantizer) for _, quantizer in quantizers(final)} == {LSQ}
    expected = {name: value for name, value in state(module.net).items() if not name.endswith("delta")}
    assert state(final).keys() == expected.keys()
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(final(images), module.eval()(images))


def test_delta_has_the_learning_rate_of_quantizers_and_no_decay() -> None:
    module = make_module({"noise_tempering": {"_target_": TARGET}})
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    found = [groups[id(quantizer.delta)] for _, quantizer in quantizers(module.net)]
    assert {(group["name"], group["weight_decay"]) for group in found} == {("quantizer", 0.0)}


def test_a_channel_wise_quantizer_has_a_delta_per_channel() -> None:
    recipe = {**RECIPE, "weight": {**RECIPE["weight"], "granularity": "channel"}}
    module = make_module({"noise_tempering": {"_target_": TARGET}}, quantizer=recipe)
    fit(module, max_epochs=1, limit_train_batches=2)
    assert module.net.conv1.weight_quantizer.delta.shape == (4, 1, 1, 1)
    assert len(module.net.conv1.weight_quantizer.delta.unique()) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_dist": "cauchy"}, "noise_dist=cauchy: use one of uniform, one, bernoulli, gauss, blind"),
        ({"noise_site": "bias"}, "noise_site=bias: use one of forward, grad"),
        ({"grad_scale": "row"}, "grad_scale=row: use one of elementwise, scalar"),
        ({"delta_learn": "sgd"}, "delta_learn=sgd: use one of carrier, shared, hessian, fixed"),
        ({"lambda_0": -1.0}, "lambda_0=-1.0, kappa=5.0: use 0 or more, finite"),
        ({"kappa": math.inf}, "kappa=inf: use 0 or more, finite"),
        ({"lambda_final": 2.0}, "lambda_final=2.0: use more than 0, up to lambda_0"),
        ({"delta": 3.0}, "delta=3.0: use 0..2"),
        ({"delta_learn": "shared", "lambda_0": 0.0}, "delta_learn=shared: delta learns from the noise"),
        ({"delta_learn": "hessian", "grad_scale": "scalar"}, "delta_learn=hessian: goes with grad_scale=elementwise"),
        ({"hessian": {"probes": 0}}, "hessian.probes=0: use 1 or more"),
    ],
)
def test_refusals_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="callbacks.noise_tempering") as caught:
        NoiseTempering(**options)
    assert message in str(caught.value)


def test_a_network_of_other_quantizers_is_refused() -> None:
    recipe = {role: {**spec, "name": "minmax", "init": "minmax"} for role, spec in RECIPE.items()}
    with pytest.raises(ValueError, match="no lsq quantizer to temper, use quantizer=lsq"):
        make_module({"noise_tempering": {"_target_": TARGET}}, quantizer=recipe)


def test_compiled_equals_eager() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(tempered(torch.zeros(6, 7), noise_dist="one", strength=0.5))
    values, upstream = torch.randn(2, 6, 7, dtype=torch.float64)
    found = []
    for compiled in (False, True):
        if compiled:
            layer.compile(backend="aot_eager", fullgraph=True)
        v = values.clone().requires_grad_()
        out = layer(v)
        layer.zero_grad()
        out.backward(upstream)
        found.append([out.detach(), v.grad, layer[0].raw_scale.grad.clone(), layer[0].delta.grad.clone()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-12, atol=1e-12)
