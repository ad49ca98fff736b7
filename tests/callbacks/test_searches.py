"""What holds for several searches for widths: what a perturbation leaves alone, ranges that a budget counts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.bit_search import BitSearch
from callbacks.csq.search import PlaneSearch
from callbacks.sdq import quantizer as sdq_quantizer
from callbacks.sdq.formulas import share_of_higher
from research.learning.finalise import finalise
from research.learning.perturbation import moved_parameters
from research.quant.allocation import Allocation
from research.quant.cost_convention import CostConvention
from research.quant.cost_report import cost_report
from research.quant.layers import quant_layers
from tests.callbacks.searches import ENDS, on_residual, only_mechanic
from tests.callbacks.test_bsq import bsq
from tests.callbacks.test_csq import csq
from tests.callbacks.test_drop_bits import ENDS as SRQ_ENDS
from tests.callbacks.test_drop_bits import RECIPE, drop_bits
from tests.callbacks.test_edge_mpq import edge_mpq
from tests.callbacks.test_sdq import sdq
from tests.callbacks.test_ssps import ssps
from tests.learning.tiny import LSQ, fit

SAM: dict[str, Any] = {"_target_": "callbacks.sam.SAM"}
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sdq": (sdq(), {"beta"}),
    "ssps": (ssps(), {"alpha"}),
    "drop_bits": (drop_bits(), {"log_a"}),
    "edge_mpq": (edge_mpq(), {"d", "xmax"}),
    "csq": (csq(), {"gates"}),
}
"""The mechanic, and the last names of the parameters that choose a width."""


@pytest.mark.parametrize("slug", CHOICES)
def test_sam_moves_all_that_is_trained_but_what_chooses_a_width(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanics, choices = CHOICES[slug]
    module = on_residual({"sam": SAM, **mechanics}, {**RECIPE, **SRQ_ENDS} if slug == "drop_bits" else None)
    moved: set[str] = set()

    def spied(net: Any, state: Any, moves: dict[str, Tensor]) -> dict[str, Tensor]:
        moved.update(moves)
        return moved_parameters(net, state, moves)

    monkeypatch.setattr("callbacks.sam.moved_parameters", spied)
    fit(module, max_epochs=1, limit_train_batches=1)
    trained = {name for name, parameter in module.net.named_parameters() if parameter.requires_grad}
    chosen = {name for name in trained if name.rpartition(".")[2] in choices}
    assert chosen and moved == trained - chosen
    weights = {f"{name}.weight" for name, layer in quant_layers(module.net) if layer.weight.requires_grad}
    planes = {name for name in trained if name.endswith(("weight_quantizer.positive", "weight_quantizer.negative"))}
    assert len(weights) + len(planes) / 2 == len(list(quant_layers(module.net))) and weights | planes <= moved


def test_both_evaluations_of_sam_have_the_widths_of_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"budget": None, "start": 0.6, "strength": 10.0, "lr": 1e-6, "until": 0.9}
    module, drawn = on_residual({"sam": {**SAM, "rho": 0.5}, **sdq(**options)}), []

    def spied(*arguments: Any) -> Tensor:
        drawn.append(share_of_higher(*arguments))
        return drawn[-1]

    monkeypatch.setattr(sdq_quantizer, "share_of_higher", spied)
    fit(module, limit_train_batches=3, limit_val_batches=0)
    steps = torch.stack(drawn).detach().reshape(6, 2, 6)  # by evaluation and layer
    assert torch.equal(steps[:, 0], steps[:, 1])
    assert 0 < float(steps.mean()) < 1


@pytest.mark.parametrize("slug", CHOICES)
def test_the_cost_of_the_present_widths_is_logged(slug: str) -> None:
    module = on_residual(CHOICES[slug][0], {**RECIPE, **SRQ_ENDS} if slug == "drop_bits" else None)
    logged = fit(module, max_epochs=1).callback_metrics
    search = only_mechanic(module, BitSearch)  # type: ignore[type-abstract]
    budget = search.budgets[0]
    cost = budget.cost(search.counts, Allocation.of(module.net))
    assert cost <= budget.value and float(logged["cost/average_bits"]) == pytest.approx(cost)


@pytest.mark.parametrize("mechanics", [bsq, csq], ids=["bsq", "csq"])
def test_the_ranges_that_a_budget_counts_are_those_of_the_finished_network(mechanics: Any) -> None:
    convention: dict[str, Any] = {"first_last": "excluded", "count_ranges": True}
    budget: dict[str, Any] = {"kind": "size", "value": 3 * 4608 + 6 * 32, "convention": convention}
    by_channel = {**LSQ, "weight": {**LSQ["weight"], "granularity": "channel"}, **ENDS}
    module = on_residual(mechanics(budget=budget), by_channel)
    fit(module)
    search: Any = only_mechanic(module, PlaneSearch)  # type: ignore[type-abstract]
    net = finalise(module)["final"]
    size = cost_report(net, (3, 8, 8), "conv1", "fc", CostConvention(**convention))["size_bits"]
    assert size <= budget["value"]
    assert size == search.budgets[0].cost(search.counts, Allocation.of(net))
