"""CSQ as a mechanic: gates that seek a budget, what is fixed when, the exact network at the end, what it refuses."""

from itertools import compress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.csq import CSQ
from callbacks.csq.quantizer import GatedPlanes
from research.deploy.deployed import deployed
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.layers import quant_layers
from research.quant.quantizers.lsq import LSQ as LSQQuantizer
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import LSQ, RESNET, StopAt, fit, float_weights, make_data, make_module, state, tiny_net

SLUG = "csq"


def csq(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.csq.CSQ", "budget": THREE, **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, CSQ on it."""
    return on_residual(csq(**options), quantizer)


def mechanic(module: QuantModule) -> CSQ:
    return only_mechanic(module, CSQ)


class Watch(pl.Callback):
    """Temperature, open gates and widths that every step was computed with."""

    def __init__(self) -> None:
        self.beta: list[float] = []
        self.hard: list[bool] = []
        self.gates: list[torch.Tensor] = []
        self.widths: list[Allocation] = []

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Any) -> None:
        planes = list(mechanic(module).quantizers.values())
        self.beta.append(float(planes[0].beta))
        self.hard.append(bool(planes[0].hard))
        self.gates.append(torch.stack([each.gates.detach().clone() for each in planes]))
        self.widths.append(Allocation.of(module.net))


def test_the_gates_are_fixed_within_the_budget_and_ends_stay() -> None:
    module, watch = searching(ticket=0.5, strength=0.1), Watch()
    fit(module, callbacks=(watch,))
    assert watch.hard == [False] * 4 + [True] * 4
    assert watch.beta == pytest.approx([200 ** (step / 4) for step in range(8)])
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in watch.widths)
    assert {bits.input for name, bits in watch.widths[0].items() if name not in ("conv1", "fc")} == {4}
    assert all(seen == watch.widths[4] for seen in watch.widths[4:])
    found = mechanic(module)
    (budget,) = found.budgets
    assert budget.met(found.counts, watch.widths[4])
    assert not budget.met(found.counts, watch.widths[0])
    assert Allocation.of(finalise(module)["final"]) == watch.widths[-1]


@pytest.mark.parametrize("value", [2, 4, 7])
def test_a_penalty_alone_leads_to_the_budget_from_above_and_from_below(value: int) -> None:
    module = searching(budget={**THREE, "value": value}, strength=1.0)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    planes = list(found.quantizers.values())
    generator = torch.Generator().manual_seed(0)
    for each in planes:  # five of seven planes open
        each.beta.fill_(3)
        each.gates.data.copy_(torch.linspace(0.4, -0.2, 7) + 0.05 * torch.rand(7, generator=generator))
        each.settle_bits()
    (budget,) = found.budgets
    start = budget.cost(found.counts, Allocation.of(module.net)) - value
    excess = []
    for _ in range(400):
        (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
        for each, gradient in zip(planes, torch.autograd.grad(term, [each.gates for each in planes]), strict=True):
            each.gates.data -= 0.05 * gradient
        found.after_step(module)
        excess.append(float(found.excess()) * 8)
    assert abs(start) > 0.9
    assert budget.cost(found.counts, Allocation.of(module.net)) - value == pytest.approx(excess[-1], abs=1e-5)
    assert abs(excess[-1]) < 0.6
    assert max(map(abs, excess[-100:])) < 0.6, "it stays"


@pytest.mark.parametrize("ratio", ["cost", "gates"])
def test_the_penalty_is_the_distance_from_the_budget_times_the_gates_at_their_temperature(ratio: str) -> None:
    module = searching(ratio=ratio, strength=0.3)
    found, generator = mechanic(module), torch.Generator().manual_seed(0)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    opened, bits, weights = 0, 0, 0
    for each in found.quantizers.values():
        each.beta.fill_(3)
        each.gates.data.copy_(torch.randn(7, generator=generator))
        places = list(compress(range(7), (each.gates >= 0).tolist()))
        opened += len(places)
        bits += each.positive.shape[1] * (places[-1] - places[0] + 2)
        weights += each.positive.shape[1]
    expected = {"cost": (bits / weights - 3) / 8, "gates": opened / 42 - 2 / 7}[ratio]
    assert float(found.excess()) == pytest.approx(expected, rel=1e-5)
    (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
    gates = sum(float(torch.sigmoid(3 * each.gates.detach()).sum()) for each in found.quantizers.values())
    assert term.item() == pytest.approx(0.3 * expected * gates, rel=1e-5)


def test_long_behind_the_ticket_the_temperature_is_a_number() -> None:
    module, watch = searching(ticket=0.05), Watch()
    fit(module, make_data(batch_size=2, options={"train": 88, "test": 16}), max_epochs=1, callbacks=(watch,))
    assert len(watch.beta) == 40 and watch.beta[:4] == pytest.approx([200 ** (step / 2) for step in range(4)])
    assert watch.beta[-1] == pytest.approx(1e30)
    assert all(bool(value.isfinite().all()) for value in state(module).values())


def test_the_end_is_the_exact_network_that_the_planes_stand_for() -> None:
    module = searching(ticket=0.5, logit=0.5, lr_factor=10.0)
    fit(module)
    planes = {name: each for name, each in mechanic(module).quantizers.items()}
    codes = {name: each.codes(each.positive) for name, each in planes.items()}
    net = finalise(module)["final"]
    for name, layer in quant_layers(net):
        assert type(layer.weight_quantizer) is LSQQuantizer
        if name in planes:
            assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes[name])
            assert torch.equal(layer.quantized_weight(), layer.weight)
            torch.testing.assert_close(layer.weight, codes[name] * planes[name].scale.detach())
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(deployed(net)(images), net(images))


def test_a_cold_network_computes_what_its_exact_form_does() -> None:
    module = searching(ticket=0.5, logit=1.0)
    fit(module)
    for each in mechanic(module).quantizers.values():
        for logits in (each.positive, each.negative):
            logits.data.copy_(torch.where(logits >= 0, 1.0, -1.0) * logits.abs().clamp(min=0.1))
    images = torch.randn(4, 3, 8, 8)
    net = finalise(module)["final"]
    for name, layer in quant_layers(module.net):
        weight = dict(quant_layers(net))[name].quantized_weight()
        torch.testing.assert_close(layer.quantized_weight(), weight, rtol=1e-4, atol=1e-5)
    assert net(images).shape == module.eval()(images).shape


def test_before_the_ticket_the_exact_form_is_within_the_budget_too() -> None:
    module = searching(ticket=1.0, budget={**THREE, "value": 2.5})
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, callbacks=(StopAt(3),))
    found, before = mechanic(module), state(module)
    assert not bool(found.state.fixed)
    assert found.budgets[0].met(found.counts, Allocation.of(finalise(module)["final"]))
    assert [name for name, value in state(module).items() if not torch.equal(value, before[name])] == []


def test_a_host_that_no_run_has_prepared_has_an_exact_form() -> None:
    net = finalise(searching())["final"]
    assert {type(layer.weight_quantizer) for _, layer in quant_layers(net)} == {LSQQuantizer}


def test_a_float_checkpoint_becomes_planes(tmp_path: Path) -> None:
    weights = float_weights(tmp_path / "float.safetensors", RESNET)
    module = make_module(csq(), model=RESNET, quantizer={**LSQ, **ENDS}, checkpoint=weights)

    class First(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, host: Any, batch: Any, batch_idx: int) -> None:
            for name, layer in mechanic(host).layers.items():
                planes = layer.weight_quantizer
                assert isinstance(planes, GatedPlanes)
                float_weight = host.initial_network().get_submodule(name).weight
                step = float_weight.abs().max() / 127
                torch.testing.assert_close(planes.codes(layer.weight) * step, float_weight, rtol=0, atol=float(step))
                assert not layer.weight.requires_grad

    fit(module, max_epochs=1, limit_train_batches=1, callbacks=(First(),))


def test_rounds_begin_undecided_and_keep_what_closed() -> None:
    module, watch = searching(rounds=2, ticket=0.5, strength=5.0), Watch()
    fit(module, max_epochs=4, callbacks=(watch,))
    assert watch.beta[:8] == pytest.approx([200 ** (step / 4) for step in (0, 1, 2, 3)] * 2)
    assert watch.beta[8:11] == pytest.approx([200.0, 200**1.25, 200**1.5])
    assert watch.hard == [False] * 8 + [True] * 8
    assert float(watch.gates[4].max()) <= 0
    assert float(watch.gates[4].min()) < 0


def test_a_crash_at_any_point_leaves_no_trace(tmp_path: Path) -> None:
    options = {"rounds": 2, "ticket": 0.75, "strength": 1.0}  # a new round in front of step 3, gates fixed at 6
    whole = searching(**options)
    fit(whole, folder=tmp_path / "whole")
    for stop in (3, 5, 7):
        folder = tmp_path / str(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(searching(**options), folder=folder, callbacks=(StopAt(stop),))
        pl.seed_everything(99, verbose=False)
        resumed = searching(**options)
        fit(resumed, folder=folder, resume=folder / "checkpoints/last.ckpt")
        assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


def test_digits_can_have_an_optimizer_or_a_rate_of_their_own() -> None:
    def groups(**options: Any) -> dict[str, dict[str, Any]]:
        module = searching(**options)
        trainer = fit(module, max_epochs=1, limit_train_batches=1)
        digits = {id(each.positive) for each in mechanic(module).quantizers.values()}
        found = {}
        for group in trainer.optimizers[0].param_groups:
            own = bool(digits & {id(parameter) for parameter in group["params"]})
            if group["name"] == SLUG:
                found["digits" if own else "others"] = group
        return found

    plain = groups(lr_factor=10.0)
    assert plain["digits"]["initial_lr"] == pytest.approx(1.0)
    assert plain["others"]["initial_lr"] == pytest.approx(0.1)
    assert {group["weight_decay"] for group in plain.values()} == {1e-3}
    adam = groups(adam_lr=0.02, weight_decay=0.0)
    assert adam["digits"]["initial_lr"] == 0.02 and "betas" in adam["digits"]
    assert {group["weight_decay"] for group in adam.values()} == {0.0}


def test_metrics_name_widths_planes_and_the_distance() -> None:
    module = searching()
    trainer = fit(module, max_epochs=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    widths = {name: value for name, value in logged.items() if name.startswith("bits/")}
    assert widths == Allocation.of(module.net).metrics()
    assert {f"csq/planes/{name}" for name in mechanic(module).layers} <= logged.keys()
    assert logged["csq/distance"] > 0 and logged["csq/beta"] > 1
    assert "train/step/csq" in logged


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, _ = allocation_left(module, tmp_path)
    assert left == Allocation.of(finalise(module)["final"])


def test_the_greatest_gate_of_a_layer_is_never_closed_unless_a_layer_may_vanish() -> None:
    for keep_one in (True, False):
        module = searching(keep_one=keep_one)
        planes = mechanic(module).quantizers["layer1.0.conv1"]
        planes.gates.data.copy_(torch.tensor([-0.4, -0.1, -0.3, -0.2, -0.5, -0.6, -0.7]))
        mechanic(module).after_step(module)
        assert planes.opened().tolist() == [False, keep_one, False, False, False, False, False]
        assert int(planes.bits) == 2 * keep_one
        assert float(planes.gates[0].detach()) == pytest.approx(-0.4)


def test_all_layers_and_one_that_may_vanish() -> None:
    module = make_module(
        csq(search_ends=True, keep_one=False, budget={"kind": "average_bits", "value": 4}), model=tiny_net()
    )
    found = mechanic(module)
    assert list(found.layers) == ["conv1", "fc"]
    found.quantizers["conv1"].gates.data.fill_(-1)
    found.quantizers["fc"].gates.data.fill_(1)
    widths = Allocation.of(finalise(module)["final"])
    assert (widths["conv1"].weight, widths["fc"].weight) == (0, 8)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"callbacks.csq.budget.value=1.5: feasible are 2 to 8 bits per weight"):
        fit(searching(budget={**THREE, "value": 1.5}), max_epochs=1)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching(ticket=0.5)
    fit(module, max_epochs=1)
    for each in mechanic(module).quantizers.values():
        each.fix(torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"callbacks.csq.budget.value=3: the widths cost 8 bits per weight"):
        finalise(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes": 8}, "planes=8"),
        ({"strength": -1.0}, "strength=-1"),
        ({"ratio": "size"}, "ratio=size"),
        ({"ratio": "gates", "budget": {"kind": "bops", "value": 1e6}}, "ratio=gates"),
        ({"beta_max": 0.5}, "beta_max=0.5"),
        ({"ticket": 0.0}, "ticket=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"logit": 0.0}, "logit=0"),
        ({"lr_factor": 0.0}, "lr_factor=0"),
        ({"adam_lr": 0.0}, "adam_lr=0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
        ({"budget": {"kind": "activation_max", "value": 3}}, "budget"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.csq[.:]{message}"):
        CSQ(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({}, "no quantized weight"),
        ({**LSQ, "weight": {"name": "dorefa", "bits": 4}}, "use quantizer.weight.name=lsq"),
        ({**LSQ, "widths": [2, 4]}, r"quantizer.widths=\[\]"),
        ({**LSQ, "fold_bn": 2}, "quantizer.fold_bn=none"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(quantizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.csq: .*{message}"):
        make_module(csq(), model=RESNET, quantizer=quantizer)


@pytest.mark.parametrize("other", ["callbacks.bin_regularization.BinRegularization", "callbacks.kurtosis.Kurtosis"])
def test_what_acts_on_latent_weights_is_refused(other: str) -> None:
    slug = other.split(".")[1]
    with pytest.raises(ValueError, match=f"callbacks.csq: callbacks.{slug} acts on latent weights"):
        make_module({**csq(), slug: {"_target_": other}}, model=RESNET)
