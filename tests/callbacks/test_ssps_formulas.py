"""SSPS: golden vectors of the search, the identities of its formulas, and its cell by itself."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.ssps.cost import ExpectedCost, repaired
from callbacks.ssps.formulas import (
    CERTAINTIES,
    Certainty,
    carried,
    cells_due,
    certainty,
    excess_penalty,
    gumbel,
    most_certain_first,
    relaxed_pick,
)
from callbacks.ssps.quantizer import Grad, SearchCell
from research.quant.allocation import LayerBits
from research.quant.budget import Budget, Counts
from research.quant.cost import LayerCost
from research.quant.quantizers import Quantizer, QuantizerSpec, build_quantizer

DOUBLE = torch.float64
WIDTHS = [2, 3, 4, 8]


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden("ssps").items()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().to(DOUBLE), expected, rtol=1e-12, atol=1e-14)


def counts_of(vectors: dict[str, Tensor]) -> Counts:
    """The golden network's numbers of weights and operations."""
    numbers = zip(vectors["params"].tolist(), vectors["macs"].tolist(), vectors["act_bits"].tolist(), strict=True)
    layers = [
        LayerCost(
            name=f"l{row}",
            weights=int(weights),
            biases=0,
            macs=int(macs),
            inputs=1,
            outputs=1,
            fan_in=9,
            ranges=0,
            weight_bits=torch.tensor(8.0),
            input_bits=torch.tensor(bits),
        )
        for row, (weights, macs, bits) in enumerate(numbers)
    ]
    return Counts(tuple(layers), "l0", "l3")


def expected_cost(kind: Any, value: float, vectors: dict[str, Tensor]) -> ExpectedCost:
    """Of the golden network, whose inputs are fixed."""
    candidates, inputs = vectors["candidates"].int().tolist(), vectors["act_bits"].int().tolist()
    choices = {f"l{row}": [LayerBits(b, a) for b in candidates] for row, a in enumerate(inputs)}
    pairs = {name: [[pair] for pair in options] for name, options in choices.items()}
    return ExpectedCost.of_pairs([Budget(kind, value)], counts_of(vectors), choices, pairs)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def test_golden_expected_costs_and_their_gradients(vectors: dict[str, Tensor]) -> None:  # check 4
    alpha = vectors["alpha"].clone().requires_grad_()
    p, single = torch.softmax(alpha, 1), torch.ones(4, 1, dtype=DOUBLE)
    same(p, vectors["prob"])
    same((p * vectors["candidates"]).sum(1), vectors["exp_bits"])
    for kind, value, slope in (
        ("bops", "exp_bops", "dbops_dalpha"),
        ("size", "exp_size_bits", "dsize_dalpha"),
    ):
        cost = expected_cost(kind, 1.0, vectors).ratios(p, single)[0]
        same(cost, vectors[value])
        same(gradient(cost, alpha), vectors[slope])
        assert float(vectors[slope].sum(1).abs().max()) < 1e-9 * float(cost.detach()), "rows sum to 0"


def test_golden_hinge(vectors: dict[str, Tensor]) -> None:
    alpha = vectors["alpha"].clone().requires_grad_()
    table = expected_cost("bops", float(vectors["target_bops"]), vectors)
    ratios = table.ratios(torch.softmax(alpha, 1), torch.ones(4, 1, dtype=DOUBLE))
    loss = float(vectors["lam"]) * excess_penalty(ratios, two_sided=False)
    same(loss, vectors["hinge_loss"])
    same(gradient(loss, alpha), vectors["hinge_grad_alpha"])


def test_golden_picks(vectors: dict[str, Tensor]) -> None:
    soft = relaxed_pick(vectors["alpha"], vectors["gumbel"], float(vectors["tau"]))
    same(soft, vectors["soft"])
    assert torch.equal(soft.argmax(1).to(DOUBLE), vectors["pick"])
    assert torch.equal(torch.nn.functional.one_hot(soft.argmax(1), 4).to(DOUBLE), vectors["onehot"])


def test_golden_straight_through_gradients(vectors: dict[str, Tensor]) -> None:  # check 5
    for row in range(4):
        alpha = vectors["alpha"][row].clone().requires_grad_()
        soft = relaxed_pick(alpha, vectors["gumbel"][row], vectors["tau"])
        branches = vectors["branch_out"][row]
        y = carried(branches[int(vectors["pick"][row])], soft, list(branches))
        assert torch.equal(y, vectors["y"][row])
        loss = (vectors["gout"][row] * y).sum()
        same(gradient(loss, soft), vectors["grad_soft"][row])
        same(gradient(loss, alpha), vectors["grad_alpha_st"][row])


def test_golden_certainties(vectors: dict[str, Tensor]) -> None:
    measured = {
        measure: torch.tensor([certainty(p, measure) for p in vectors["prob"].tolist()], dtype=DOUBLE)
        for measure in CERTAINTIES
    }
    for measure, values in measured.items():
        same(values, vectors[f"cert_{measure}"])
    order = most_certain_first({str(row): value for row, value in enumerate(measured["max"].tolist())})
    assert [int(name) for name in order] == vectors["order_max"].int().tolist()


@pytest.mark.parametrize("measure", CERTAINTIES)
def test_certainty_is_1_for_a_made_choice_and_ties_go_to_the_first(measure: Certainty) -> None:  # check 6
    assert certainty([0.0, 1.0, 0.0], measure) == pytest.approx(1)
    assert certainty([0.25] * 4, measure) == pytest.approx({"max": 0.25, "margin": 0, "entropy": 0}[measure])
    assert most_certain_first({"b": 0.5, "c": 0.7, "a": 0.5}) == ["c", "b", "a"]


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_picks_are_as_frequent_as_probable(tau: float) -> None:  # check 3
    alpha = torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=DOUBLE)
    u = torch.rand(10_000, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    picks = relaxed_pick(alpha.expand_as(u), gumbel(u), tau).argmax(1)
    found = torch.bincount(picks, minlength=4) / len(u)
    torch.testing.assert_close(found.double(), torch.softmax(alpha, 0), atol=0.02, rtol=0)


def test_the_expected_cost_of_two_draws_is_their_mean_cost(vectors: dict[str, Tensor]) -> None:
    """Weights and inputs of a layer pick independently: the product of the expectations, in both forms of BOPs."""
    counts = counts_of(vectors)
    weights, inputs = [2, 3, 8], [4, 8]
    choices = {layer.name: [LayerBits(w, a) for w in weights for a in inputs] for layer in counts.layers}
    pairs = {name: [[LayerBits(w, a) for a in inputs] for w in weights] for name in choices}
    p, q = torch.tensor([[0.5, 0.3, 0.2]] * 4, dtype=DOUBLE), torch.tensor([[0.25, 0.75]] * 4, dtype=DOUBLE)
    ew, ea = 0.5 * 2 + 0.3 * 3 + 0.2 * 8, 0.25 * 4 + 0.75 * 8
    for form, each in (("product", ew * ea), ("uniq", ew * ea + ew + ea + np.log2(9))):
        budget = Budget.from_config({"kind": "bops", "value": 1.0, "convention": {"form": form, "input_bits": None}})
        cost = ExpectedCost.of_pairs([budget], counts, choices, pairs).ratios(p, q)
        assert float(cost) == pytest.approx(each * float(vectors["macs"].sum()), rel=1e-6)


def test_a_maximum_is_held_by_its_greatest_expected_share(vectors: dict[str, Tensor]) -> None:
    counts = counts_of(vectors)
    choices = {layer.name: [LayerBits(8, a) for a in (2, 8)] for layer in counts.layers}
    pairs = {name: [options] for name, options in choices.items() if name != "l3"}
    budget = Budget.from_config({"kind": "activation_max", "value": 4, "convention": {"input_bits": None}})
    table = ExpectedCost.of_pairs([budget], counts, choices, pairs)
    q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=DOUBLE)
    assert float(table.ratios(torch.ones(3, 1, dtype=DOUBLE), q)) == 8 / 4
    assert float(table.others) == 2, "the first choice of a layer that is not searched"
    assert table.excess(torch.ones(3, 1, dtype=DOUBLE), q) == pytest.approx((8 - 4) / 4 + (5 - 4) / 4)


def test_the_constraint_has_no_gradient_within_the_budget_unless_two_sided(vectors: dict[str, Tensor]) -> None:
    alpha = vectors["alpha"].clone().requires_grad_()
    table = expected_cost("bops", 2 * float(vectors["exp_bops"]), vectors)
    ratios = table.ratios(torch.softmax(alpha, 1), torch.ones(4, 1, dtype=DOUBLE))
    assert float(excess_penalty(ratios, False)) == 0 and not gradient(excess_penalty(ratios, False), alpha).any()
    assert float(excess_penalty(ratios, True)) == pytest.approx(0.25)
    assert gradient(excess_penalty(ratios, True), alpha).any()


def test_gradients_of_the_cost_by_finite_differences(vectors: dict[str, Tensor]) -> None:  # check 4
    table = expected_cost("bops", float(vectors["target_bops"]), vectors)

    def penalty(alpha: Tensor) -> Tensor:
        return excess_penalty(table.ratios(torch.softmax(alpha, 1), torch.ones(4, 1, dtype=DOUBLE)), False)

    torch.autograd.gradcheck(penalty, vectors["alpha"].clone().requires_grad_())


@pytest.mark.parametrize("cells", [1, 7, 20, 40])
def test_cells_are_fixed_evenly_and_all_at_the_end(cells: int) -> None:  # check 6
    due = [cells_due(step, 10, 60, 25, cells) for step in range(70)]
    assert due == sorted(due) and due[:11] == [0] * 11
    assert due[12] == -(-cells // 25) and due[59] <= cells and due[60:] == [cells] * 10
    assert [cells_due(step, 0, 1, 25, cells) for step in range(2)] == [0, cells]


def test_the_repair_takes_the_least_loss_per_saving() -> None:
    cost = {"a": [1.0, 2.0, 4.0], "b": [10.0, 20.0, 40.0]}
    p = {"a": [0.1, 0.2, 0.7], "b": [0.1, 0.3, 0.6]}

    def total(picks: Mapping[str, int]) -> float:
        return sum(cost[name][index] for name, index in picks.items())

    def repair(limit: float) -> dict[str, int]:
        return repaired(
            {"a": 2, "b": 2}, p, lambda picks: total(picks) <= limit, lambda picks: max(total(picks) - limit, 0.0)
        )

    assert repair(44) == {"a": 2, "b": 2}
    assert repair(42) == {"a": 2, "b": 1}, "b loses 0.3 for the whole excess of 2, a 0.5"
    assert repair(24) == {"a": 2, "b": 1}
    assert repair(23) == {"a": 2, "b": 0}, "b loses another 0.2 for the excess of 1, a 0.5"
    assert repair(11) == {"a": 0, "b": 0}


# -- the cell ----------------------------------------------------------------------------------------------------


def quantizer_of(name: str = "lsq", role: Any = "weight", **options: Any) -> Quantizer:
    shape, axis = ((6, 5), 0) if role == "weight" else ((), None)
    return build_quantizer(QuantizerSpec(name, 8, **options), shape, axis, role).double()


def cell_of(x: Tensor, grad: Grad = "all", source: Quantizer | None = None) -> SearchCell:
    """In float64, calibrated on ``x``, logits that differ."""
    cell = SearchCell(source or quantizer_of(), WIDTHS, grad).double()
    cell.initialise(x)
    cell.alpha.data.copy_(torch.tensor([0.3, -0.4, 0.9, 0.1]))
    cell.follow()
    return cell


def pick(cell: SearchCell, index: int) -> None:
    cell.noise.zero_()
    cell.noise[index] = 5.0


SOURCES: dict[str, dict[str, Any]] = {
    "lsq": {},
    "per channel": {"granularity": "channel"},
    "lsq_plus": {"name": "lsq_plus", "role": "input"},
    "minmax": {"name": "minmax"},
    "asymmetric": {"name": "minmax", "role": "input", "options": {"symmetric": False}},
    "dorefa": {"name": "dorefa"},
    "pact": {"name": "pact", "role": "input"},
}


@pytest.mark.parametrize("grad", ["all", "sampled"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_training_step_is_one_candidate_by_itself(source: str, grad: Grad) -> None:  # check 2
    x = torch.randn(6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    cell = cell_of(x, grad, quantizer_of(**SOURCES[source]))
    for index, width in enumerate(WIDTHS):
        alone = quantizer_of(**SOURCES[source])
        alone.bits.fill_(width)
        alone.initialise(x)
        pick(cell, index)
        gradients = []
        for quantizer, own in ((cell, cell.quantizers[index]), (alone, alone)):
            leaf = x.clone().requires_grad_()
            y = quantizer(leaf)
            leaves = [leaf, *own.parameters()]
            gradients.append([y.detach(), *torch.autograd.grad((upstream * y).sum(), leaves)])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert len({tuple(each.scale.flatten().tolist()) for each in cell.quantizers}) == len(WIDTHS), "ranges of their own"


@pytest.mark.parametrize("grad", ["all", "sampled"])
def test_the_gradient_of_the_logits(grad: Grad) -> None:  # check 5
    x, upstream = torch.randn(6, 5, dtype=DOUBLE), torch.randn(6, 5, dtype=DOUBLE)
    cell, tau = cell_of(x, grad), 0.7
    cell.tau.fill_(tau)
    cell.noise.copy_(torch.tensor([0.2, 1.4, -0.3, 0.1]))
    soft = cell.soft.detach()
    of_soft = torch.stack([(upstream * quantizer(x)).sum() for quantizer in cell.quantizers]).detach()
    if grad == "sampled":
        of_soft = of_soft * (torch.arange(4) == soft.argmax())
    expected = soft / tau * (of_soft - (soft * of_soft).sum())
    torch.testing.assert_close(gradient((upstream * cell(x)).sum(), cell.alpha), expected, rtol=1e-10, atol=1e-12)


def test_equal_branches_leave_the_logits_alone() -> None:  # check 5
    x = torch.randn(6, 5, dtype=DOUBLE)
    cell = cell_of(x)
    for quantizer in cell.quantizers:
        quantizer.load_state_dict(cell.quantizers[0].state_dict())
    found = gradient((torch.randn(6, 5, dtype=DOUBLE) * cell(x)).sum(), cell.alpha)
    torch.testing.assert_close(found, torch.zeros(4, dtype=DOUBLE), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grad", ["all", "sampled"])
def test_evaluation_takes_the_most_probable_candidate(grad: Grad) -> None:
    x = torch.randn(6, 5, dtype=DOUBLE)
    cell = cell_of(x, grad).eval()
    pick(cell, 0)
    alone = cell.quantizers[2]
    assert int(cell.bits) == 4 and torch.equal(cell(x), alone(x))
    assert torch.equal(cell.codes(x), alone.codes(x)) and torch.equal(cell.dequantize(cell.codes(x)), cell(x))
    assert torch.equal(cell.codes_ste(cell.transform(x)), alone.codes(x).double())
    assert [float(limit) for limit in cell.limits()] == [-8, 7]
    assert cell.grid == alone.grid and cell.scale is not None and cell.zero_point is None
    assert float(cell.expected_bits.detach()) == pytest.approx(
        float((torch.softmax(cell.alpha, 0) * torch.tensor(WIDTHS)).sum())
    )
    cell.alpha.data.zero_()
    cell.follow()
    assert int(cell.bits) == 8, "of equal ones the widest"


def test_without_rounding_it_is_the_picked_candidates_surrogate() -> None:
    x = torch.randn(6, 5, dtype=DOUBLE)
    cell = cell_of(x)
    pick(cell, 0)
    cell.mode = "relax"
    assert torch.equal(cell(x), cell.quantizers[0].fake_quantize(x, rounding=False))
    cell.mode = "identity"
    assert cell(x) is x


@pytest.mark.parametrize("grad", ["all", "sampled"])
def test_a_fixed_cell_picks_nothing_else(grad: Grad) -> None:  # check 6
    x = torch.randn(6, 5, dtype=DOUBLE)
    cell = cell_of(x, grad)
    cell.fix(1)
    pick(cell, 3)
    cell.alpha.data.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    cell.follow()
    assert int(cell.bits) == 3 and torch.equal(cell(x), cell.quantizers[1](x))
    assert not gradient(cell(x).sum(), cell.alpha).any()
    assert cell.probabilities.tolist() == [0, 1, 0, 0] and float(cell.expected_bits) == 3


def test_signs_of_inputs_are_those_of_the_data() -> None:
    source = quantizer_of(role="input")
    cell = cell_of(torch.rand(6, 5, dtype=DOUBLE), source=source)
    assert not bool(cell.signed) and not any(bool(quantizer.signed) for quantizer in cell.quantizers)
    assert bool(cell_of(torch.randn(6, 5, dtype=DOUBLE), source=source).signed)
