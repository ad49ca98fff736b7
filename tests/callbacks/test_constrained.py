"""Constrained learning as a mechanic: both passes, gradients, the dual step, widths. Numbered: its spec's checks."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.constrained import Constrained
from callbacks.constrained.networks import LayerRecord
from research.curvature.batches import FixedBatches
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.batchnorm import reestimate_batchnorm
from research.quant.calibrate import calibrate
from research.quant.layers import quantizers
from research.quant.passes import passes
from tests.callbacks.saq_host import TASK
from tests.learning.tiny import CLASSES, LSQ, RESNET, fit, make_module, state, tiny_net

NAME = "callbacks.constrained.MeanMagnitudeDoReFa"
Batch = tuple[Tensor, Tensor]


def recipe(bits: int = 2, widths: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"weight": {"name": NAME, "bits": bits}, "input": {"name": NAME, "bits": bits}, "widths": list(widths)}


def constrained(**options: Any) -> dict[str, Any]:
    small = {"images": 16, "batch_size": 8}
    return {"constrained": {"_target_": "callbacks.constrained.Constrained", **small, **options}}


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def host(
    duals: float | None = None, quantizer: dict[str, Any] | None = None, **options: Any
) -> tuple[QuantModule, Constrained]:
    """A residual network in float64 whose multipliers all are ``duals``, where that is given."""
    module = make_module(constrained(**options), model=RESNET, quantizer=quantizer or recipe(), task=TASK).double()
    calibrate(module.net, [batch()[0]])
    (mechanic,) = module.active
    assert isinstance(mechanic, Constrained)
    mechanic.prepare(module, None)
    mechanic.batches = FixedBatches((batch(),))
    if duals is not None:
        mechanic.state.duals.fill_(duals)
    return module, mechanic


def gradients(module: QuantModule) -> dict[str, Tensor]:
    """Gradients of the objective on one batch, by name in the host."""
    module.zero_grad()
    module.objective(batch()).loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def high_outputs(module: QuantModule, mechanic: Constrained) -> Tensor:
    with passes(module.net, mode="relax"):
        outputs: Tensor = module.evaluate(batch(), mechanic.state.network_state()).outputs
    return outputs


def low_pass(module: QuantModule, mechanic: Constrained, width: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The quantized network at a width: logits, and by layer its quantized input and its output; no gradient."""
    net, record = module.net, LayerRecord(mechanic.layers)
    norms = width if module.recipe.widths else None
    with torch.no_grad(), record.recording() as (inputs, outputs), passes(net, bits=width, batchnorm=norms):
        low = net(batch()[0])
        return low, {name: (inputs[name].clone(), outputs[name].clone()) for name in mechanic.layers}


def layer_differences(mechanic: Constrained, kept: dict[str, tuple[Tensor, Tensor]], width: int) -> list[Tensor]:
    """By layer the clipped output with relaxed weights minus the rounded one with quantized weights."""
    found = []
    for name, layer in mechanic.layers.items():
        z, y = kept[name]
        t = torch.tanh(layer.weight)
        relaxed = layer.weight.detach().abs().mean() * t / t.abs().max()
        steps = 2**width - 1
        found.append(layer.operate(z, relaxed).clamp(0, 1) - torch.round(y.clamp(0, 1) * steps) / steps)
    return found


def soft_cross_entropy(low: Tensor, high: Tensor) -> Tensor:
    return -(high.softmax(1) * low.log_softmax(1)).sum(1).mean()


# -- the Lagrangian ------------------------------------------------------------------------------------------------


def test_without_multipliers_it_is_high_precision_training_bit_for_bit() -> None:  # check 1
    model = tiny_net(dropout=0.25)
    module = make_module(constrained(dual_lr=0.0), model=model, quantizer=recipe())
    module.active[0].state.duals.zero_()  # type: ignore[attr-defined]
    fit(module, max_epochs=1)
    plain = make_module(model=model, quantizer=recipe())
    for _, quantizer in quantizers(plain.net):
        quantizer.mode = "relax"
    fit(plain, max_epochs=1)
    for name in ("conv1.weight", "fc.weight", "fc.bias"):
        assert torch.equal(module.net.get_parameter(name), plain.net.get_parameter(name))
    high = dict(module.mechanics["constrained"].norms.named_parameters())  # type: ignore[union-attr, operator]
    assert torch.equal(high["bn1.weight"], plain.net.get_parameter("bn1.weight"))
    assert torch.equal(high["bn1.bias"], plain.net.get_parameter("bn1.bias"))


def test_weights_have_no_gradient_through_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:  # check 2
    module, _ = host(duals=2.0)
    with_ste = gradients(module)
    monkeypatch.setattr("research.quant.quantizers.dorefa.straight_through", lambda value, surrogate: value.detach())
    without = gradients(module)
    norms = {name for name in with_ste if ".bn" in name and name.startswith("net.")}
    assert with_ste.keys() - norms == without.keys() - norms
    for name in with_ste.keys() - norms:
        torch.testing.assert_close(without[name], with_ste[name], rtol=0, atol=0)
    assert any(name not in without or not torch.equal(without[name], with_ste[name]) for name in norms)


def test_the_gradient_of_weights_is_that_of_the_three_terms_written_out() -> None:
    module, mechanic = host(duals=2.0, eps_layer=0.25, eps_out=0.5)
    found = gradients(module)
    low, kept = low_pass(module, mechanic, 2)
    high = high_outputs(module, mechanic)
    loss = F.cross_entropy(high, batch()[1])
    loss = loss + 2 * (soft_cross_entropy(low, high) - 0.5)
    for difference in layer_differences(mechanic, kept, 2):
        loss = loss + 2 * (difference.square().mean() - 0.25)
    weights = {name: p for name, p in module.net.named_parameters() if p.ndim > 1}
    expected = torch.autograd.grad(loss, list(weights.values()))
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[f"net.{name}"], value, rtol=1e-9, atol=1e-12)
    assert float(module.objective(batch()).loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-9)


def test_at_several_widths_each_has_multipliers_and_bounds_of_its_own() -> None:
    bounds: dict[str, Any] = {"eps_layer": {2: 0.25, 4: 0.125}, "eps_out": {2: 0.5, 4: 0.75}}
    module, mechanic = host(quantizer=recipe(2, (2, 4)), **bounds)
    duals = torch.rand(mechanic.state.duals.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mechanic.state.duals.copy_(duals)
    high = high_outputs(module, mechanic)
    expected = F.cross_entropy(high, batch()[1])
    for row, width in enumerate((2, 4)):
        low, kept = low_pass(module, mechanic, width)
        expected = expected + duals[row, -1] * (soft_cross_entropy(low, high) - bounds["eps_out"][width])
        for dual, difference in zip(duals[row], layer_differences(mechanic, kept, width), strict=False):
            expected = expected + dual * (difference.square().mean() - bounds["eps_layer"][width])
    assert module.objective(batch()).loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_absolute_distance_of_the_layers() -> None:
    module, mechanic = host(distance="absolute")
    _, kept = low_pass(module, mechanic, 2)
    found, _ = mechanic._distances(batch(), {}, high_outputs(module, mechanic), None, list(mechanic.layers))
    expected = torch.stack([difference.abs().mean() for difference in layer_differences(mechanic, kept, 2)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_detached_inputs_change_the_low_batchnorms_alone() -> None:
    attached, detached = (gradients(host(duals=2.0, attach_inputs=choice)[0]) for choice in (True, False))
    changed = {name for name, value in attached.items() if not torch.equal(value, detached[name])}
    assert changed and all(name.startswith("net.") and ".bn" in f".{name}" for name in changed)


def test_low_precision_of_32_bits_is_the_same_network() -> None:  # check 4
    module, mechanic = host(clip=False)
    module.eval()
    with passes(module.net, mode="relax"):
        high = high_outputs(module, mechanic).detach()
        distances, output = mechanic._distances(batch(), {}, high, None, list(mechanic.layers))
    assert float(distances.detach().abs().max()) < 1e-20
    entropy = -(high.softmax(1) * high.log_softmax(1)).sum(1).mean()
    assert float(output.detach()) == pytest.approx(float(entropy), rel=1e-12)
    for bits in (2, 4, 8):  # no quantized network comes as near: a bound below the entropy cannot be met
        module, mechanic = host(clip=False, quantizer=recipe(bits))
        module.eval()
        high = high_outputs(module, mechanic).detach()
        _, output = mechanic._distances(batch(), {}, high, None, list(mechanic.layers))
        assert float(output.detach()) > -float((high.softmax(1) * high.log_softmax(1)).sum(1).mean())


def test_layers_are_compared_on_the_same_input() -> None:  # check 5
    module, mechanic = host(clip=False)
    module.eval()
    last = list(mechanic.layers)[-1]
    record = LayerRecord(mechanic.layers)
    with record.recording() as (_, outputs), torch.no_grad():
        high_logits = high_outputs(module, mechanic)
        high = outputs[last].clone()
        module.net(batch()[0])
        own = (high - outputs[last]).square().mean()
        distances, _ = mechanic._distances(batch(), {}, high_logits, None, [last])
    assert float(own) > 1.2 * float(distances)


def test_both_networks_move_their_own_statistics() -> None:
    module, mechanic = host(duals=1.0)
    before = state(module)
    gradients(module)
    after = state(module)
    for name, norm in mechanic.state.named_norms():
        low, high = f"net.{name}.running_mean", f"mechanics.constrained.norms.{name.replace('.', '/')}.running_mean"
        assert norm.num_batches_tracked == 1 and after[f"net.{name}.num_batches_tracked"] == 1
        assert not torch.equal(after[low], before[low]) and not torch.equal(after[high], before[high])
    assert any(not torch.equal(after[f"net.{name}.running_mean"], norm.running_mean)
               for name, norm in mechanic.state.named_norms())  # fmt: skip


# -- the dual step -------------------------------------------------------------------------------------------------


def test_feasible_layers_keep_no_multiplier_and_violated_ones_grow_by_their_slack() -> None:  # check 3
    for eps, layerwise in ((1e3, True), (0.0, False)):
        module = make_module(constrained(eps_layer=eps, layerwise=layerwise), model=RESNET, quantizer=recipe())
        trainer = fit(module)
        duals = module.active[0].state.duals  # type: ignore[attr-defined]
        assert not duals[0, :-1].any() and duals[0, -1] > 1
        assert ("constrained/dual/conv1" in trainer.logged_metrics) == layerwise
    module = make_module(constrained(eps_layer=0.0, dual_lr=0.5), model=RESNET, quantizer=recipe())
    trainer = fit(module, max_epochs=1)
    kept = module.active[0].state  # type: ignore[attr-defined]
    torch.testing.assert_close(kept.duals[0, :-1], 0.5 * kept.slacks[0, :-1])
    assert (kept.duals[0, :-1] > 0).all()
    logged = trainer.logged_metrics
    assert float(logged["constrained/dual/conv1"]) == float(kept.duals[0, 0])
    assert float(logged["constrained/slack/output"]) == float(kept.slacks[0, -1])


def test_slacks_are_means_over_samples_in_evaluation_mode() -> None:
    module, mechanic = host(eps_layer=0.1, eps_out=0.2)
    images, labels = batch()
    before = state(module)
    whole, loss = mechanic.mean_slacks()
    mechanic.batches = FixedBatches(((images[:6], labels[:6]), (images[6:], labels[6:])))
    split, _ = mechanic.mean_slacks()
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    module.eval()
    assert float(loss) == pytest.approx(float(F.cross_entropy(high_outputs(module, mechanic), labels)), rel=1e-9)


def test_the_dual_step_takes_no_more_images_than_an_epoch_has() -> None:
    for images, expected in ((1280, 32), (16, 16)):
        module = make_module(constrained(images=images), quantizer=recipe())
        fit(module, max_epochs=1, limit_train_batches=1)
        assert module.active[0].batches.samples == expected  # type: ignore[attr-defined]


def test_every_width_has_multipliers_bounds_and_batchnorms_of_its_own() -> None:
    options = {"eps_layer": {2: 0.0, 4: 1e3}, "eps_out": {2: 0.7, 4: 1e3}}
    module = make_module(constrained(**options), model=RESNET, quantizer=recipe(2, (2, 4)))
    fit(module, max_epochs=2)
    duals = module.active[0].state.duals  # type: ignore[attr-defined]
    assert (duals[0, :-1] > 0).all() and not duals[1].any(), "the second width is feasible"
    fresh = make_module(constrained(), model=RESNET, quantizer=recipe(2, (2, 4)))
    trained = module.net.get_submodule("bn1.by_width")
    assert int(trained["2"].num_batches_tracked) == int(trained["4"].num_batches_tracked) == 8  # type: ignore[index, union-attr, arg-type]
    grads = gradients(fresh.double())
    assert grads["net.bn1.by_width.2.weight"].any() and grads["net.bn1.by_width.4.weight"].any()


# -- the selection -------------------------------------------------------------------------------------------------


class Widths(pl.Callback):
    """How many layers have 8-bit weights in every step."""

    def __init__(self) -> None:
        self.wide: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.wide.append(sum(bits.weight == 8 for bits in Allocation.of(module.net).values()))


@pytest.mark.parametrize(("select_at", "narrow"), [(0.25, 4), (0.4, 8), (1.0, 12)])
def test_widths_change_at_the_end_of_the_epoch_in_which_it_is_time(select_at: float, narrow: int) -> None:
    module, widths = make_module(constrained(keep=2, select_at=select_at), model=RESNET, quantizer=recipe()), Widths()
    fit(module, max_epochs=3, callbacks=(widths,))
    assert widths.wide == [0] * narrow + [2] * (12 - narrow)
    assert sum(bits.weight == 8 for bits in Allocation.of(module.net).values()) == 2


def test_a_range_whose_width_stays_is_kept_by_the_selection() -> None:
    narrow = {"weight": {**LSQ["weight"], "bits": 2}, "input": {**LSQ["input"], "bits": 8}}
    module, mechanic = host(quantizer=narrow, keep=2)
    mechanic.state.duals[0, 1:3] = 1
    chosen = [f"{name}.weight_quantizer.raw_scale" for name in list(mechanic.layers)[1:3]]
    ranges = {name: p for name, p in module.net.named_parameters() if name.endswith("raw_scale")}
    for value in ranges.values():
        value.data.mul_(1.5)
    before = {name: value.detach().clone() for name, value in ranges.items()}
    mechanic._select()
    assert [name for name, value in ranges.items() if not torch.equal(value, before[name])] == chosen


def test_a_selection_leaves_statistics_that_fit_its_widths() -> None:
    module, mechanic = host(keep=2)
    mechanic.state.duals[0, 1:3] = 1
    before = norm_statistics(module)
    mechanic._select()
    found = norm_statistics(module)
    assert not torch.equal(found, before)
    reestimate_batchnorm(module.net, [batch()[0]])
    torch.testing.assert_close(norm_statistics(module), found)


def norm_statistics(module: QuantModule) -> Tensor:
    return torch.cat([buffer.flatten() for name, buffer in module.net.named_buffers() if "running_" in name])


# -- bad settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps_layer": -1.0}, "eps_layer=-1.0: use 0 or more"),
        ({"eps_out": {2: -1.0}}, "eps_out="),
        ({"dual_lr": -1.0}, "dual_lr=-1.0: use 0 or more"),
        ({"distance": "cubic"}, "distance='cubic': use"),
        ({"high": "quantize"}, "high='quantize': use"),
        ({"keep": 0}, "keep=0: use 1 or more"),
        ({"keep": 1, "budget": {"kind": "size", "value": 1}}, "keep=1: use"),
        ({"high_bits": 9}, "high_bits=9: use 1 to 8"),
        ({"select_at": 0.0}, "select_at=0.0: use a fraction"),
        ({"budget": {"kind": "size"}}, "budget="),
        ({"eps_out": {4: 0.1}}, "eps_out={4: 0.1}: use one number"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        make_module(constrained(**options))
    assert f"callbacks.constrained.{message}" in str(refusal.value)


def test_a_high_precision_that_a_quantizer_does_not_have_is_refused_at_the_start() -> None:
    binary = {"weight": {"name": "binary", "bits": 1}, "input": LSQ["input"]}
    with pytest.raises(ValueError) as refusal:
        fit(make_module(constrained(keep=1), model=RESNET, quantizer=binary), max_epochs=1)
    assert str(refusal.value).startswith("callbacks.constrained.high_bits=8: ")


def test_networks_that_it_cannot_treat_are_refused() -> None:
    with pytest.raises(ValueError, match="use quantizer.fold_bn=none"):
        make_module(constrained(), quantizer={**recipe(), "fold_bn": 2})
    with pytest.raises(ValueError, match=r"use quantizer.widths=\[\]"):
        make_module(constrained(keep=1), model=RESNET, quantizer=recipe(2, (2, 4)))
