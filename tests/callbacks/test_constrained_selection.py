"""Layer selection by multipliers: which layers, within which budget, and the network that comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.constrained.selection import candidates, largest, within
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.cost_convention import CostConvention
from research.quant.layers import quant_layers
from research.runs.allocation import read_allocation
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from tests.callbacks.searches import THREE
from tests.callbacks.test_constrained import constrained, recipe
from tests.learning.tiny import LSQ, RESNET, SIDE, fit, make_module

PRESENT = Allocation({"conv1": (8, 8), "a": (2, 2), "b": (2, 2), "c": (2, 32), "fc": (2, 2)})
DUALS = {"conv1": 9.0, "a": 0.1, "b": 0.3, "c": 0.2}

WIDE_ENDS = [{"match": "@first", "weight": {"bits": 8}}, {"match": "@last", "weight": {"bits": 8}}]


def test_constrained_layers_with_fewer_bits_can_be_chosen() -> None:
    assert candidates(PRESENT, list(DUALS), 4) == {
        "conv1": [(8, 8)],
        "a": [(2, 2), (4, 4)],
        "b": [(2, 2), (4, 4)],
        "c": [(2, 32), (4, 32)],
        "fc": [(2, 2)],
    }


@pytest.mark.parametrize(("keep", "chosen"), [(1, {"b"}), (2, {"b", "c"}), (3, {"a", "b", "c"})])
def test_the_largest_multipliers_are_kept(keep: int, chosen: set[str]) -> None:
    found = largest(DUALS, candidates(PRESENT, list(DUALS), 4), keep)
    assert {name for name in found if found[name].weight == 4 != PRESENT[name].weight} == chosen


def counts(model: dict[str, Any] = RESNET) -> tuple[QuantModule, Counts]:
    module = make_module(model=model, quantizer=recipe())
    structure = module.net.structure()
    return module, Counts.of(module.net, (3, SIDE, SIDE), structure.first, structure.last)


def test_a_budget_leaves_out_the_least_multipliers_that_it_can() -> None:
    module, costs = counts()
    present = Allocation.of(module.net)
    layers = [name for name, _ in quant_layers(module.net)][1:-1]
    duals = {name: float(index + 1) for index, name in enumerate(layers)}
    choices = candidates(present, layers, 4)
    budget = Budget("average_bits", 3.0, CostConvention(first_last="excluded"))
    found = within(duals, choices, costs, [budget])
    assert budget.met(costs, found)
    left = sum(duals[name] for name in layers if found[name] == present[name])
    best = min(
        sum(value for name, value in duals.items() if not mask >> layers.index(name) & 1)
        for mask in range(2 ** len(layers))
        if budget.met(
            costs,
            Allocation({n: choices[n][-1 if n in layers and mask >> layers.index(n) & 1 else 0] for n in choices}),
        )
    )
    assert left == best


@pytest.mark.parametrize("quantizer", [recipe(), {slot: {**LSQ[slot], "bits": 2} for slot in LSQ}], ids=["own", "lsq"])
def test_a_search_ends_within_its_budget_and_leaves_its_allocation(quantizer: Any, tmp_path: Path) -> None:
    quantizer = {**quantizer, "rules": WIDE_ENDS}
    module = make_module(constrained(eps_layer=0.0, budget=THREE, high_bits=4, select_at=0.5), model=RESNET,
                         quantizer=quantizer)  # fmt: skip
    folder = RunFolder.of(tmp_path, "search", {})
    folder.path.mkdir(parents=True)
    mechanic: Any = module.active[0]
    trainer = fit(module)
    trainer.loggers = [RunLogger(folder)]
    mechanic.on_train_end(trainer, module)
    found = Allocation.of(finalise(module)["final"])
    budget = mechanic.budgets[0]
    assert budget.met(mechanic.counts, found)
    assert set(found.values()) == {LayerBits(8, 2), LayerBits(2, 2), LayerBits(4, 4)}
    assert bool(mechanic.state.selected) and (mechanic.state.final_duals > 0).all()
    assert read_allocation(folder.path / "allocation.yaml") == found
    assert trainer.logged_metrics["bits/layer3.0.conv1.weight"] == found["layer3.0.conv1"].weight
    assert float(trainer.logged_metrics["cost/average_bits"]) == pytest.approx(budget.cost(mechanic.counts, found))
    for _, layer in quant_layers(module.net):
        assert layer.weight_quantizer is not None and bool(layer.weight_quantizer.initialised)


def test_the_number_of_kept_layers_is_taken_by_the_ranking() -> None:
    module = make_module(constrained(eps_layer=0.0, keep=2, select_at=0.5), model=RESNET, quantizer=recipe())
    fit(module)
    kept: Any = module.mechanics["constrained"]
    found = Allocation.of(module.net)
    names = list(module.active[0].layers)  # type: ignore[attr-defined]
    order = [names[index] for index in torch.argsort(kept.final_duals, descending=True)]
    assert {name for name in found if found[name] == (8, 8)} == set(order[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 99}, "callbacks.constrained.keep=99: use 1 to"),
        ({"keep": 1, "high_bits": 2}, "callbacks.constrained.high_bits=2: no constrained layer has fewer bits"),
        ({"budget": {**THREE, "value": 1.5}}, "callbacks.constrained.budget.value=1.5: feasible are 2 to"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        fit(make_module(constrained(**options), model=RESNET, quantizer=recipe()))
    assert str(refusal.value).startswith(message)


def test_widths_beyond_the_budget_are_refused_at_the_end() -> None:
    module = make_module(constrained(budget=THREE, high_bits=4), model=RESNET, quantizer=recipe())
    fit(module, max_epochs=1, limit_train_batches=2)
    present = Allocation.of(module.net)
    Allocation({name: (4, 4) for name in present}).apply(module.net)
    with pytest.raises(ValueError, match="budget.value=3: the widths cost 4"):
        finalise(module)
