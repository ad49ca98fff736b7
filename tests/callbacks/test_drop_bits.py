"""DropBits as a mechanic: what it drops and when, how a search ends, and what it leaves alone."""

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.drop_bits import DropBits
from callbacks.drop_bits.quantizer import DroppedBits
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.layers import quantizers
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.srq import SRQ
from tests.callbacks.searches import THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import RESNET, StopAt, fit, make_module, state, tiny_net

SLUG = "drop_bits"
RECIPE: dict[str, Any] = {
    "weight": {"name": "srq", "bits": 4, "signed": True, "init": "mse"},
    "input": {"name": "srq", "bits": 4, "signed": "auto", "init": "mse"},
}
LSQ8 = {"name": "lsq", "bits": 8}
ENDS = {"rules": [{"match": end, "weight": LSQ8, "input": LSQ8} for end in ("@first", "@last")]}
FIXED: dict[str, Any] = {"budget": None, "strength": 0.0, "input_bits": 4}


def drop_bits(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.drop_bits.DropBits", "budget": THREE, **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, DropBits on it."""
    return on_residual(drop_bits(**options), quantizer or {**RECIPE, **ENDS})


def mechanic(module: QuantModule) -> DropBits:
    return only_mechanic(module, DropBits)


def set_logits(found: DropBits, value: float) -> None:
    for quantizer in found.dropped.values():
        quantizer.log_a.data.fill_(value)


class Watch(pl.Callback):
    """Masks, noise and widths of every step."""

    def __init__(self) -> None:
        self.masks: list[list[float]] = []
        self.noise: list[list[float]] = []
        self.widths: list[Allocation] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        dropped = mechanic(module).dropped.values()
        self.masks.append([float(mask) for each in dropped for mask in each.levels().masks.detach()])
        self.noise.append([float(value) for each in dropped for value in each.noise])
        self.widths.append(Allocation.of(module.net))


class Force(pl.Callback):
    """Sets ``log_a`` in front of every step."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        set_logits(mechanic(module), self.value)


def inner(allocation: Allocation) -> list[LayerBits]:
    return [bits for name, bits in allocation.items() if name not in ("conv1", "fc")]


def test_a_penalty_alone_takes_all_bits_and_none_leaves_them() -> None:  # check 7
    module = searching(strength=0.5)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    log_a = [quantizer.log_a for quantizer in found.dropped.values()]
    optimizer = torch.optim.Adam(log_a, lr=0.3)
    for step in range(40):
        (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
        optimizer.zero_grad()
        term.backward()
        assert step or all(bool((each.grad > 0).all()) for each in log_a)
        optimizer.step()
    assert all(found._logits()[i] <= [-1.0] * 3 for i in range(len(log_a)))
    found.budgets = []
    found.after_step(module)
    assert {bits.weight for bits in inner(Allocation.of(module.net))} == {1}
    free = searching(**FIXED)
    assert mechanic(free).loss_terms(None) == {}  # type: ignore[arg-type]


def test_the_term_weighs_layers_by_their_size_or_alike() -> None:
    for weighting in ("size", "layer"):
        module = searching(strength=0.5, input_bits=3, input_strength=0.25, weighting=weighting)
        found = mechanic(module)
        found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
        layers = list(found.layers)
        p = {name: torch.rand(()) for name in layers}
        for name, quantizer in found.dropped.items():
            set_to = torch.logit(p[name.rpartition(".")[0]]) - (quantizer.nonzero - quantizer.log_a).detach()
            quantizer.log_a.data.copy_(set_to)
        terms = found.loss_terms(None)  # type: ignore[arg-type]
        sizes = {name: layer.weight.numel() if weighting == "size" else 1 for name, layer in found.layers.items()}
        mean = sum(sizes.values()) / len(sizes)
        expected = 0.5 * sum(3 * float(p[name]) * sizes[name] / mean for name in layers)
        assert float(terms[SLUG].detach()) == pytest.approx(expected, rel=1e-5)
        if weighting == "layer":
            inputs = 0.25 * sum(2 * float(p[name]) for name in layers)
            assert float(terms["drop_bits_inputs"].detach()) == pytest.approx(inputs, rel=1e-5)
        gradients = torch.autograd.grad(sum(terms.values()), list(module.net.parameters()), allow_unused=True)  # type: ignore[arg-type]
        log_a = {id(quantizer.log_a) for quantizer in found.dropped.values()}
        for parameter, gradient in zip(module.net.parameters(), gradients, strict=True):
            assert (gradient is not None) == (id(parameter) in log_a)


def test_every_step_has_its_own_masks_and_all_its_evaluations_the_same() -> None:
    runs = []
    for seed in (0, 0, 1):
        watch = Watch()
        module = make_module(drop_bits(**FIXED, until=1.0), seed=seed, model=RESNET, quantizer={**RECIPE, **ENDS})
        fit(module, max_epochs=1, callbacks=(watch,), accumulate_grad_batches=2)
        runs.append(watch.noise)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second, third = runs[0][:3]
    assert first == second and second != third
    assert len(set(first)) == len(first), "every level draws by itself"


def test_fixed_widths_end_with_all_levels_on() -> None:
    module, watch = searching(**FIXED, keep=0.3, until=0.5), Watch()
    fit(module, callbacks=(watch,))
    assert all(min(masks) < 1 for masks in watch.masks[:4]), "bits are dropped"
    assert all(set(masks) == {1.0} for masks in watch.masks[4:])
    assert all(set(inner(seen)) == {LayerBits(4, 4)} for seen in watch.widths)
    net = finalise(module)["final"]
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), module.eval().net(images))
    assert {type(quantizer) for _, quantizer in quantizers(net)} == {SRQ, LSQ}
    whole, watch = searching(**FIXED, keep=0.3, until=1.0, learn=False), Watch()
    log_a = [quantizer.log_a.detach().clone() for quantizer in mechanic(whole).dropped.values()]
    fit(whole, max_epochs=1, callbacks=(watch,))
    assert min(watch.masks[-1]) < 1
    assert all(torch.equal(a, each.log_a) for a, each in zip(log_a, mechanic(whole).dropped.values(), strict=True))
    assert finalise(whole)["final"] is not None


def test_at_its_end_the_search_is_within_the_budget() -> None:
    module, watch = searching(until=0.5, strength=1e-4), Watch()
    fit(module, callbacks=(watch,))
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in watch.widths)
    assert all(set(inner(seen)) == {LayerBits(4, 4)} for seen in watch.widths[:4])
    found = mechanic(module)
    assert all(found.within(seen) for seen in watch.widths[4:]) and len(set(watch.widths[4:])) == 1
    masks = [mask for bits in inner(watch.widths[-1]) for mask in ([1.0] * bits.weight + [0.0] * (4 - bits.weight))]
    assert watch.masks[-1] == masks
    net = finalise(module)["final"]
    assert not any(isinstance(quantizer, DroppedBits) for _, quantizer in quantizers(net))
    assert Allocation.of(net) == watch.widths[-1]
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), module.eval().net(images))
    rebuilt = finalise(searching())["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert Allocation.of(rebuilt) == watch.widths[-1] and torch.equal(rebuilt(images), net(images))


def test_weights_and_inputs_are_searched_together() -> None:
    budget = [THREE, {"kind": "bops", "value": 600000}]
    module = searching(budget=budget, input_bits=4, until=0.5, strength=1e-4)
    fit(module)
    found = Allocation.of(module.net)
    assert mechanic(module).within(found) and any(bits.input < 4 for bits in inner(found))


def test_inputs_without_a_quantizer_are_left_alone() -> None:
    module = searching({**RECIPE, "input": None}, input_bits=2, until=0.5)
    assert mechanic(module).dropped.keys() == {f"{name}.weight_quantizer" for name in mechanic(module).layers}
    fit(module, max_epochs=1)
    assert {bits.input for bits in inner(Allocation.of(module.net))} == {32}


def test_the_search_ends_as_soon_as_the_probable_widths_are_within_the_budget() -> None:
    module, watch = searching(lr=1e-6, until=0.9), Watch()
    fit(module, callbacks=(Force(-2.0), watch))
    assert bool(mechanic(module).state.over) and len(set(watch.widths)) == 1
    assert set(inner(watch.widths[0])) == {LayerBits(1, 4)}, "decided after the first step"
    done = searching(budget={**THREE, "value": 4})
    fit(done, max_epochs=1, limit_train_batches=1)
    assert bool(mechanic(done).state.over) and set(inner(Allocation.of(done.net))) == {LayerBits(4, 4)}
    assert {float(value) for each in mechanic(done).dropped.values() for value in each.noise} == {0.5}, "nothing drawn"


def set_probabilities(found: DropBits, values: dict[str, list[float]]) -> None:
    """``P(Z != 0)`` of the levels of the quantizers, and the widths that follow from them."""
    for name, quantizer in found.dropped.items():
        p = torch.tensor(values[name])
        quantizer.log_a.data.copy_(torch.logit(p) - (quantizer.nonzero - quantizer.log_a).detach())
        quantizer.bits.fill_(next((k for k, each in enumerate(values[name], start=1) if each <= 0.5), len(p) + 1))


def test_a_reduction_to_the_budget_has_the_least_odds_against_it() -> None:
    module = searching(bits=3, budget={**THREE, "value": 2})
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    generator = torch.Generator().manual_seed(0)
    values = {name: (0.4 + 0.5 * torch.rand(2, generator=generator)).tolist() for name in found.dropped}
    set_probabilities(found, values)
    present = Allocation.of(module.net)
    assert not found.within(present)
    tables: dict[str, list[float]] = {}
    for name in found.layers:
        odds = [math.log(p / (1 - p)) for p in values[f"{name}.weight_quantizer"][: present[name].weight - 1]]
        tables[name] = [sum(odds[k:]) for k in range(len(odds) + 1)]
    best = math.inf
    for widths in itertools.product(*(range(1, present[name].weight + 1) for name in tables)):
        picked = dict(zip(tables, widths, strict=True))
        layers = {name: LayerBits(picked.get(name, bits.weight), bits.input) for name, bits in present.items()}
        if found.within(Allocation(layers)):
            best = min(best, sum(tables[name][width - 1] for name, width in picked.items()))
    chosen = found.read_out()
    assert found.within(chosen)
    assert sum(tables[name][chosen[name].weight - 1] for name in tables) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("p", [0.55, 0.65, 0.9])
def test_a_reduction_takes_no_more_than_the_budget_asks_for(p: float) -> None:
    module = searching(bits=4, input_bits=4, budget=THREE)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    set_probabilities(found, dict.fromkeys(found.dropped, [p] * 3))
    chosen = found.read_out()
    (budget,) = found.budgets
    cost = budget.cost(found.counts, chosen)
    assert cost <= 3
    assert {bits.input for bits in inner(chosen)} == {4}, "no budget counts inputs"
    for name, bits in chosen.items():
        if name in found.layers and bits.weight < 4:
            wider = Allocation({**dict(chosen.items()), name: LayerBits(bits.weight + 1, bits.input)})
            assert not found.within(wider), "one bit more would have been within the budget"


def test_without_a_search_the_widths_are_those_of_the_recipe() -> None:
    narrow = {**RECIPE, "weight": {**RECIPE["weight"], "bits": 2}, "input": {**RECIPE["input"], "bits": 3}, **ENDS}
    module = searching(narrow, **FIXED)
    assert set(inner(Allocation.of(module.net))) == {LayerBits(2, 3)}
    assert {len(quantizer.log_a) for quantizer in mechanic(module).dropped.values()} == {1, 2}
    binary = {**RECIPE, "weight": {**RECIPE["weight"], "bits": 1}, **ENDS}
    with pytest.raises(ValueError, match=r"callbacks.drop_bits: .*weight_quantizer has one bit"):
        searching(binary, **FIXED)


def test_without_a_budget_the_masks_decide() -> None:
    module = searching(budget=None, strength=1.0, until=0.5)
    name = next(iter(mechanic(module).dropped))
    watch = Watch()

    class Close(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, host: Any, *arguments: Any) -> None:
            mechanic(host).dropped[name].log_a.data[1] = -5.0

    fit(module, callbacks=(Close(), watch))
    layer = name.rpartition(".")[0]
    assert {seen[layer].weight for seen in watch.widths} == {2}
    assert {bits.weight for other, bits in watch.widths[-1].items() if other not in (layer, "conv1", "fc")} == {4}


def test_keep_1_is_plain_training_bit_for_bit() -> None:
    trained = []
    for mechanics in ({}, drop_bits(**FIXED, keep=1.0, bits=2, search_ends=True)):
        module = make_module(mechanics, model=tiny_net(dropout=0.25), quantizer=RECIPE)
        fit(module)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_log_a_has_an_adam_of_its_own_without_decay() -> None:
    module = searching(lr=0.03)
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    main, own = trainer.optimizers[0].optimizers
    (group,) = own.param_groups
    log_a = [quantizer.log_a for quantizer in mechanic(module).dropped.values()]
    assert isinstance(own, torch.optim.Adam)
    assert (group["initial_lr"], group["weight_decay"], len(group["params"])) == (0.03, 0.0, len(log_a))
    scales = [group for group in main.param_groups if group["name"] == "quantizer"]
    assert scales and all(group["weight_decay"] == 0 for group in scales)
    assert not any(p is each for g in main.param_groups for p in g["params"] for each in log_a)


def test_a_crash_in_the_search_leaves_no_trace(tmp_path: Path) -> None:
    options = {"lr": 0.5, "strength": 5.0, "until": 0.9, "budget": {**THREE, "value": 1.5}}
    whole, watch = searching(**options), Watch()
    fit(whole, folder=tmp_path / "whole", callbacks=(watch,))
    assert len(set(watch.widths)) > 1
    with pytest.raises(RuntimeError, match="stopped"):
        fit(searching(**options), folder=tmp_path / "parts", callbacks=(StopAt(5),))
    pl.seed_everything(99, verbose=False)
    resumed = searching(**options)
    fit(resumed, folder=tmp_path / "parts", resume=tmp_path / "parts/checkpoints/last.ckpt")
    assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


@pytest.mark.parametrize(
    ("total", "until", "strength", "step"),
    [(100, 0.6, 0.1, 60), (2, 0.9, 0.1, 1), (100, 1.0, 0.0, 100), (100, 0.8, 0.0, 80), (2, 0.1, 0.0, 1)],
)
def test_when_dropping_ends_at_the_latest(total: int, until: float, strength: float, step: int) -> None:
    assert DropBits(until=until, strength=strength).last_step(total) == step


def test_metrics_name_widths_expected_widths_and_the_noise() -> None:
    module = searching(until=0.9, strength=1e-3)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, callbacks=(StopAt(4),))
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert {name: logged[name] for name in Allocation.of(module.net).metrics()} == Allocation.of(module.net).metrics()
    for name, quantizer in mechanic(module).dropped.items():
        expected = float(quantizer.expected_bits.detach())
        assert 3.5 < logged[f"drop_bits/expected/{name.removesuffix('_quantizer')}"] == pytest.approx(expected)
    ratios = [float((each.sigma / each.scale).detach()) for each in mechanic(module).dropped.values()]
    assert logged["drop_bits/sigma"] == pytest.approx(sum(ratios) / len(ratios))
    with pytest.raises(ValueError, match=r"callbacks.drop_bits: .*use finalise.weights=last"):
        finalise(module)


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, retrained = allocation_left(module, tmp_path)
    assert left == Allocation.of(module.net)
    assert {type(quantizer) for _, quantizer in quantizers(retrained.net)} == {SRQ, LSQ}


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    module = searching(budget={**THREE, "value": 0.5})
    with pytest.raises(ValueError, match=r"callbacks.drop_bits.budget.value=0.5: feasible are 1 to 4 bits per weight"):
        fit(module, max_epochs=1)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    for quantizer in mechanic(module).dropped.values():
        quantizer.bits.fill_(4)
    with pytest.raises(ValueError, match=r"callbacks.drop_bits.budget.value=3: the widths cost 4 bits per weight"):
        finalise(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1: use 2 to 8"),
        ({"input_bits": 9}, "input_bits=9: use 2 to 8"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.0}, "strength=0.1: no probability to press on"),
        ({"learn": False}, "strength=0.1: no probability to press on"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": 0.0}, "budget: with strength=0"),
        ({"input_strength": -1.0}, "input_strength=-1.0: use 0 or more"),
        ({"input_strength": 0.1}, "input_strength=0.1: it needs input_bits"),
        ({"weighting": "bits"}, "weighting=bits: use one of layer, size"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"until": 1.0}, "until=1.0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^callbacks.drop_bits.{message}"):
        DropBits(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "options", "message"),
    [
        ({}, {}, "no quantized weight"),
        ({**RECIPE, "weight": {"name": "lsq", "bits": 4}}, {}, "LSQ, and only bits of srq are dropped; use"),
        ({**RECIPE, "weight": {"name": "rq", "bits": 4}}, {}, "RQ, and only bits of srq"),
        ({**RECIPE, "input": {"name": "lsq", "bits": 4}}, {"input_bits": 4}, "input_quantizer is LSQ"),
        ({**RECIPE, "widths": [2, 4]}, {}, r"PerWidth.*quantizer.widths=\[\]"),
    ],
)
def test_networks_whose_bits_it_cannot_drop_are_refused(
    quantizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"callbacks.drop_bits: .*{message}"):
        make_module(drop_bits(**options), model=RESNET, quantizer=quantizer)
