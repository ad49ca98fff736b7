"""Edge-MPQ as a mechanic: what moves when, what presses, how a search ends, and what it leaves alone."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.edge_mpq import EdgeMPQ, StepRange
from callbacks.edge_mpq.mechanic import widest
from callbacks.edge_mpq.pressure import coarsen_until, penalty, present_layers
from research.deploy.deployed import deployed
from research.deploy.description import describe, rebuild, tensors_of
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.budget import Budget
from research.quant.layers import quant_layers
from research.quant.quantizers.lsq import LSQ
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import LSQ as RECIPE
from tests.learning.tiny import RESNET, fit, make_module, state

EXCLUDED = {"first_last": "excluded"}
INPUTS: dict[str, Any] = {"kind": "activation_memory", "value": 3 * 1088, "convention": EXCLUDED}
LARGEST: dict[str, Any] = {"kind": "activation_max", "value": 3 * 256, "convention": EXCLUDED}
BOPS: dict[str, Any] = {"kind": "bops", "value": 3 * 3 * 46080, "convention": EXCLUDED}
WITH_ZERO_POINT: dict[str, Any] = {"name": "minmax", "bits": 4, "options": {"symmetric": False}}
BOTH: dict[str, Any] = {"budget": THREE, "input_budget": INPUTS}


def edge_mpq(**options: Any) -> dict[str, Any]:
    """On both, unless another budget is given."""
    budgets = {} if "budget" in options else BOTH
    return {"edge_mpq": {"_target_": "callbacks.edge_mpq.EdgeMPQ", "update_every": 1, **budgets, **options}}


def searching(**options: Any) -> QuantModule:
    return on_residual(edge_mpq(**options))


def prepared(**options: Any) -> tuple[QuantModule, EdgeMPQ]:
    """Weights calibrated, inputs as 4-bit ranges from 0 to 1.5; costs known."""
    module = searching(**options)
    mechanic = only_mechanic(module, EdgeMPQ)
    for name, layer in mechanic.layers.items():
        quantizer = layer.input_quantizer
        if isinstance(quantizer, StepRange):
            quantizer.initialise(torch.linspace(0, 1.5 + len(name) / 100, 200))
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.initialise(layer.weight)
    mechanic.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    return module, mechanic


def learned(module: QuantModule) -> list[Tensor]:
    """Copies of all steps and ranges."""
    found = only_mechanic(module, EdgeMPQ).quantizers
    return [parameter.detach().clone() for each in found for parameter in (each.d, each.xmax)]


def weights(module: QuantModule) -> dict[str, Tensor]:
    """Copies of the weights of all layers."""
    return {name: layer.weight.detach().clone() for name, layer in quant_layers(module.net)}


class Watch(pl.Callback):
    """Steps and ranges after every step, and the weights in front of it."""

    def __init__(self) -> None:
        self.values: list[list[Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.bits: list[Allocation] = []
        self.terms: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        if not self.values:
            self.values.append(learned(module))
        self.weights.append(weights(module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.values.append(learned(module))
        self.bits.append(widest(module.net))
        self.terms.append(float(trainer.callback_metrics.get("train/step/edge_mpq", float("nan"))))

    def moved(self) -> list[bool]:
        """Whether any of them moved, by step."""
        pairs = zip(self.values, self.values[1:], strict=False)
        return [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]


# -- a step ----------------------------------------------------------------------------------------------------


def test_steps_and_ranges_rest_between_their_updates() -> None:  # check 7
    module, watch = searching(update_every=3, until=0.99, lr_factor=1.0), Watch()
    fit(module, callbacks=(watch,))
    assert watch.moved()[:7] == [False, False, True, False, False, True, False], "in front of the last step it ends"
    for quantizer in only_mechanic(module, EdgeMPQ).quantizers:
        assert bool((quantizer.d < quantizer.xmax).all())
        assert torch.equal(quantizer.d, quantizer.scale) and torch.equal(quantizer.xmax, quantizer.reach)


def test_after_the_search_they_rest_for_good_and_the_weights_go_on() -> None:
    module, watch = searching(until=0.5), Watch()
    fit(module, callbacks=(watch,))
    assert watch.moved()[:4] == [True] * 4
    assert watch.moved()[5:] == [False] * 3, "the fifth may end with coarser steps"
    assert len(set(watch.bits[4:])) == 1
    at_the_end = watch.weights[4]
    assert [name for name, weight in weights(module).items() if torch.equal(weight, at_the_end[name])] == []


@pytest.mark.parametrize("moving", [True, False])
def test_gradients_are_clipped_to_the_steps_or_taken_away(moving: bool) -> None:
    module, mechanic = prepared(update_every=1 if moving else 2)
    trainer = type("Trainer", (), {"global_step": 0})()
    before = {}
    for quantizer in mechanic.quantizers:
        for parameter in (quantizer.d, quantizer.xmax):
            parameter.grad = torch.full_like(parameter, -3.0)
        quantizer.xmax.grad = torch.full_like(quantizer.d, 0.5) * quantizer.d.detach()
        before[quantizer] = quantizer.xmax.grad.clone()
    mechanic.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]
    for quantizer in mechanic.quantizers:
        if not moving:
            assert quantizer.d.grad is None and quantizer.xmax.grad is None
        else:
            assert quantizer.d.grad is not None and torch.equal(quantizer.d.grad, -quantizer.d.detach())
            assert quantizer.xmax.grad is not None and torch.equal(quantizer.xmax.grad, before[quantizer])


def test_they_have_a_group_of_their_own_without_decay() -> None:
    module = searching(lr_factor=0.2)
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    (group,) = [each for each in trainer.optimizers[0].param_groups if each["name"] == "edge_mpq"]
    assert len(group["params"]) == 2 * len(list(only_mechanic(module, EdgeMPQ).quantizers))
    assert group["weight_decay"] == 0 and group["initial_lr"] == pytest.approx(0.2 * 0.1)


# -- the penalty -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [THREE, INPUTS, LARGEST, BOPS], ids=lambda budget: budget["kind"])
def test_the_cost_is_that_of_the_budget_and_presses_widths_down(budget: dict[str, Any]) -> None:  # check 5
    module, mechanic = prepared(budget=budget)
    (stated,) = mechanic.budgets
    now = stated.cost(mechanic.counts, Allocation.of(module.net))
    assert now > stated.value
    for expected in (True, False):
        cost = stated.cost_of(mechanic.counts, present_layers(mechanic.counts, module.net, expected))
        assert float(cost.detach()) == now
    term = penalty(mechanic.budgets, mechanic.counts, module.net)
    assert term.item() == pytest.approx((now / stated.value - 1) ** 2)
    kilobytes = 1e-4 * (now / 8000 - stated.value / 8000) ** 2  # the official code's form
    assert term.item() * 1e-4 * (stated.value / 8000) ** 2 == pytest.approx(kilobytes)
    for quantizer in mechanic.quantizers:
        gradients = torch.autograd.grad(term, (quantizer.d, quantizer.xmax), retain_graph=True, allow_unused=True)
        if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            d, xmax = gradients
            assert d is not None and xmax is not None and float(d) < 0 < float(xmax)
        else:
            assert budget is LARGEST, "the smaller inputs"


def test_within_the_budget_nothing_presses() -> None:  # check 5
    module, mechanic = prepared(budget=[{**THREE, "value": 4}, {**INPUTS, "value": 4 * 1088}])
    term = penalty(mechanic.budgets, mechanic.counts, module.net)
    assert term.item() == 0
    for quantizer in mechanic.quantizers:
        gradients = torch.autograd.grad(term, (quantizer.d, quantizer.xmax), retain_graph=True)
        assert not any(bool(gradient.any()) for gradient in gradients)


def test_the_largest_input_presses_on_all_that_are_as_large() -> None:
    module, mechanic = prepared(budget=LARGEST)
    term = penalty(mechanic.budgets, mechanic.counts, module.net)
    quantizers = {name: layer.input_quantizer for name, layer in mechanic.layers.items()}
    pressed = [
        name
        for name, each in quantizers.items()
        if isinstance(each, StepRange) and bool(torch.autograd.grad(term, each.d, retain_graph=True)[0])
    ]
    assert pressed == ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]


def test_the_penalty_rises_and_is_gone_after_the_search() -> None:
    module, watch = searching(until=0.5, strength=2.0, lr_factor=1e-9), Watch()
    fit(module, callbacks=(watch,))
    excess = 2 * (4 / 3 - 1) ** 2  # both budgets
    assert watch.terms[:4] == pytest.approx([2.0 * rho * excess for rho in (0.01, 0.505, 1.0, 1.0)], rel=1e-4)
    assert only_mechanic(module, EdgeMPQ).loss_terms(None) == {}  # type: ignore[arg-type]


def test_no_strength_no_term() -> None:
    _, mechanic = prepared(strength=0.0)
    assert mechanic.loss_terms(None) == {}  # type: ignore[arg-type]


# -- the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", ["tensor", "channel"])
@pytest.mark.parametrize("budget", [[THREE, INPUTS], LARGEST, BOPS], ids=["sizes", "largest", "bops"])
def test_at_its_end_the_search_is_within_its_budgets(budget: Any, slices: str) -> None:
    options: dict[str, Any] = {"budget": budget, "slices": slices, "strength": 0.0}
    module = searching(**options)
    fit(module)
    mechanic, net = only_mechanic(module, EdgeMPQ), finalise(module)["final"]
    assert all(mechanic.cost(each, net) <= each.value for each in mechanic.budgets)
    assert (widest(net)["conv1"], widest(net)["fc"]) == ((8, 8), (8, 8))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), module.eval().net(images))
    rebuilt = finalise(searching(**options))["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert widest(rebuilt) == widest(net) and torch.equal(rebuilt(images), net(images))
    fixed = deployed(net)
    description = describe(fixed, RESNET, [])
    assert torch.equal(rebuild(description, tensors_of(fixed, description))(images), fixed(images))
    assert torch.equal(fixed(images), net(images))


def test_slices_have_widths_of_their_own_and_the_cost_knows_them() -> None:
    module, mechanic = prepared(budget=THREE, slices="channel")
    layer = mechanic.layers["layer1.0.conv1"]
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, StepRange) and quantizer.bits.shape == (4, 1, 1, 1)
    quantizer.coarsen(torch.tensor([2.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1))
    assert widest(module.net)["layer1.0.conv1"].weight == 4
    total = sum(each.weights for each in mechanic.counts.layers if each.name not in ("conv1", "fc"))
    expected = 4 - 144 * (4 - 11 / 4) / total
    assert mechanic.cost(mechanic.budgets[0], module.net) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(penalty(mechanic.budgets, mechanic.counts, module.net), quantizer.d)
    assert bool((gradient < 0).all())


@pytest.mark.parametrize("slices", ["tensor", "channel"])
def test_widths_go_down_where_steps_grow_least(slices: str) -> None:
    module, mechanic = prepared(budget=THREE, slices=slices)
    (budget,), quantizers = mechanic.budgets, list(mechanic.quantizers)
    generator = torch.Generator().manual_seed(2)
    for quantizer in quantizers:
        quantizer.d.data.mul_(0.3 + torch.rand(quantizer.d.shape, generator=generator))
        quantizer.project()
    before = [quantizer.d.detach().clone() for quantizer in quantizers]
    present = [quantizer.bits.clone() for quantizer in quantizers]
    assert mechanic.cost(budget, module.net) > budget.value
    coarsen_until(quantizers, lambda: mechanic.cost(budget, module.net) <= budget.value)
    assert mechanic.cost(budget, module.net) <= budget.value
    growth = [(quantizer.d / old).detach().flatten() for quantizer, old in zip(quantizers, before, strict=True)]
    largest = float(torch.cat(growth).max())
    for quantizer, old, bits in zip(quantizers, before, present, strict=True):  # the next width down needs more growth
        lower = quantizer.bits - 1
        needed = quantizer.xmax / (torch.exp2(lower - 1) - 1) / old
        assert bool(((needed > largest) | (lower < quantizer.floor)).all())
        assert bool((quantizer.bits <= bits).all())
    for quantizer, old in zip(quantizers, before, strict=True):  # one level less would not be enough
        quantizer.d.data.copy_(torch.where(quantizer.d / old == largest, old, quantizer.d))
        quantizer.settle_bits()
    assert mechanic.cost(budget, module.net) > budget.value


def test_only_what_a_budget_counts_is_searched() -> None:
    for budget, searched in ((THREE, {"weight"}), (INPUTS, {"input"}), (BOPS, {"weight", "input"})):
        module = searching(budget=budget)
        assert {each.role for each in only_mechanic(module, EdgeMPQ).quantizers} == searched
        for name, layer in quant_layers(module.net):
            inner = name not in ("conv1", "fc")
            assert (type(layer.weight_quantizer) is StepRange) == (inner and "weight" in searched)
            assert (type(layer.input_quantizer) is StepRange) == (inner and "input" in searched)


def test_the_image_keeps_its_quantizer() -> None:
    module = searching(search_ends=True)
    layers = dict(quant_layers(module.net))
    assert type(layers["conv1"].input_quantizer) is LSQ and type(layers["fc"].input_quantizer) is StepRange
    assert type(layers["conv1"].weight_quantizer) is StepRange


def test_an_open_search_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1, limit_train_batches=1)
    with pytest.raises(ValueError, match=r"callbacks.edge_mpq: .*use finalise.weights=last"):
        finalise(module)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    for quantizer in only_mechanic(module, EdgeMPQ).quantizers:
        quantizer.bits.fill_(4)
    with pytest.raises(ValueError, match=r"callbacks.edge_mpq.budget.value=3: the widths cost 4 bits per weight"):
        finalise(module)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"callbacks.edge_mpq.budget.value=1.5: feasible are 2 to 8 bits per weight"):
        fit(searching(budget={**THREE, "value": 1.5}), max_epochs=1)


def test_metrics_name_widths_and_costs() -> None:
    module = searching(slices="channel", strength=0.0)
    logged = {name: float(value) for name, value in fit(module, max_epochs=1).callback_metrics.items()}
    mechanic, found = only_mechanic(module, EdgeMPQ), widest(module.net).metrics()
    assert {name: logged[name] for name in found} == found
    assert logged["cost/average_bits"] <= 3 and logged["cost/activation_memory"] <= 3 * 1088
    for name, layer in mechanic.layers.items():
        assert layer.weight_quantizer is not None
        assert logged[f"edge_mpq/mean_bits/{name}"] == pytest.approx(float(layer.weight_quantizer.bits.mean()))


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, retrained = allocation_left(module, tmp_path)
    assert left == widest(module.net)
    assert {type(layer.weight_quantizer) for _, layer in quant_layers(retrained.net)} == {LSQ}


def test_a_strong_penalty_alone_brings_the_widths_within_the_budget() -> None:
    module, watch = searching(budget=THREE, strength=500.0, lr_factor=1.0, until=0.99), Watch()
    fit(module, callbacks=(watch,))
    mechanic = only_mechanic(module, EdgeMPQ)
    (budget,) = mechanic.budgets
    assert isinstance(budget, Budget) and any(budget.met(mechanic.counts, found) for found in watch.bits[:6])


def test_the_penalty_is_all_that_the_strength_changes() -> None:
    trained = []
    for strength in (0.0, 50.0):
        module = searching(budget={**THREE, "value": 8}, strength=strength)
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_processes_equal_one_unless_a_slope_of_weights_depends_on_the_gradient() -> None:
    assert EdgeMPQ(budget=THREE).ddp == "per_replica"
    for options in ({"g_scale": 0.0}, {"weight_surrogate": "psgd"}):
        assert EdgeMPQ(budget=THREE, **options).ddp == "exact"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": "row"}, "slices=row"),
        ({"weight_surrogate": "relu"}, "weight_surrogate=relu"),
        ({"input_surrogate": "relu"}, "input_surrogate=relu"),
        ({"start_bits": 9}, "start_bits=9"),
        ({"min_bits": 5}, "min_bits=5"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"g_scale": -1.0}, "g_scale=-1.0"),
        ({"mix": -1.0}, "mix=-1.0"),
        ({"update_every": 0}, "update_every=0"),
        ({"lr_factor": 0.0}, "lr_factor=0.0"),
        ({"ramp": 0.0}, "ramp=0.0"),
        ({"until": 1.0}, "until=1.0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
        ({"input_budget": THREE}, "input_budget.kind=average_bits: use activation_memory"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.edge_mpq.{message}"):
        EdgeMPQ(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({}, "no quantized weight"),
        ({**RECIPE, **ENDS, "weight": {"name": "ewgs", "bits": 4}}, "EWGS"),
        ({**RECIPE, **ENDS, "weight": WITH_ZERO_POINT}, "signed for weights"),
        ({**RECIPE, **ENDS, "weight": {**WITH_ZERO_POINT, "signed": True}}, "without zero point"),
        ({**RECIPE, "widths": [2, 4]}, r"quantizer.widths=\[\]"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(quantizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.edge_mpq: .*{message}"):
        make_module(edge_mpq(), model=RESNET, quantizer=quantizer)
