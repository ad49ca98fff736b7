import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from callbacks.noise_tempering import NoiseTempering, TemperedLSQ
from callbacks.noise_tempering.gradient import error_aware_gradient
from callbacks.noise_tempering.noise import NoiseDist, draw
from research.learning.finalise import finalise
from research.quant.layers import quantizers
from research.quant.quantizers.lsq import LSQ
from tests.callbacks.tempered import TARGET, close, tempered
from tests.learning.tiny import LSQ as RECIPE
from tests.learning.tiny import fit, float_weights, make_module, state, tiny_net

# -- switches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", [dist for dist in get_args(NoiseDist) if dist != "one"])
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


def test_the_hessian_rule_sets_delta_every_n_epochs(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "_target_": TARGET,
        "delta_learn": "hessian",
        "hessian": {"every_n_epochs": 2, "batches": 1, "batch_size": 8, "probes": 4},
    }
    deltas = []
    for epochs in (2, 3):
        module = make_module({"noise_tempering": config})
        fit(module, max_epochs=epochs)
        deltas.append([float(quantizer.delta) for _, quantizer in quantizers(module.net)])
    never = "callbacks.noise_tempering.hessian.every_n_epochs=2: nothing is measured in"
    assert [line.split(never)[1].split(",")[0] for line in caplog.messages if never in line] == [" 2 epochs"]
    assert deltas[0] == [0.0] * 4
    assert max(deltas[1]) > 0 and min(deltas[1]) >= 0 and max(deltas[1]) <= 2


def test_the_hessian_rule_has_a_strength_in_units_of_bins() -> None:
    hessian = {"every_n_epochs": 1, "batches": 1, "batch_size": 8, "probes": 4}
    config = {"_target_": TARGET, "delta_learn": "hessian", "hessian": hessian}
    module = make_module({"noise_tempering": config})
    trainer: Any = fit(module, max_epochs=1)
    trainer.fit_loop.epoch_progress.current.completed = trainer.fit_loop.epoch_progress.current.processed = 1
    (mechanic,) = module.active
    assert isinstance(mechanic, NoiseTempering)
    strengths = mechanic.hessian.measure(trainer, module, mechanic.rng(trainer.global_step)) or {}
    mechanic.on_train_epoch_start(trainer, module)
    found = {name: float(quantizer.delta) for name, quantizer in mechanic.quantizers.items()}
    expected = {name: float(strengths[name] * q.scale.detach()) for name, q in mechanic.quantizers.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < max(found.values()) < 2


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
    with pytest.raises(ValueError, match="conv1.input_quantizer is MinMax, which it cannot temper; use quantizer=lsq"):
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
