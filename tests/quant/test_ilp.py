"""The integer programme: the golden vector of BMPQ, brute force, its checks, and budgets that cannot be met."""

import itertools
import random

import numpy as np
import pytest
import torch

from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.cost import LayerCost
from research.quant.cost_convention import CostConvention
from research.quant.ilp import allocate, total
from research.quant.uniform import uniform

PLAIN = CostConvention(input_bits=None)


def counts_of(weights: list[int], macs: list[int] | None = None, inputs: list[int] | None = None) -> Counts:
    """A network of layers l0, l1, ... of these sizes."""
    layers = [
        LayerCost(f"l{i}", n, m, x, 1, 9, 0, 0, torch.tensor(32.0), torch.tensor(32.0))
        for i, (n, m, x) in enumerate(zip(weights, macs or weights, inputs or weights, strict=True))
    ]
    return Counts(tuple(layers), "l0", f"l{len(weights) - 1}")


def gains(values: list[float], bits: tuple[int, ...] = (2, 4)) -> dict[str, dict[LayerBits, float]]:
    """BMPQ's objective: the sum of value times bits is to be large."""
    return {f"l{i}": {LayerBits(b, b): -value * b for b in bits} for i, value in enumerate(values)}


def weight_bits(allocation: Allocation) -> list[int]:
    return [bits.weight for bits in allocation.values()]


def test_the_golden_assignment_of_bmpq(golden):
    vectors = golden("bmpq")
    counts = counts_of([int(n) for n in vectors["ilp_params"]])
    enbg = vectors["nbg_steps"].mean(0)
    np.testing.assert_allclose(enbg, vectors["enbg"], rtol=1e-12)
    sensitivities = gains(enbg.tolist(), tuple(int(b) for b in vectors["ilp_bits"]))
    budget = Budget("size", int(vectors["ilp_budget_bits"]), PLAIN)
    found = allocate(sensitivities, counts, [budget])
    assert weight_bits(found) == vectors["ilp_assign"].tolist()
    assert -total(sensitivities, found) == pytest.approx(float(vectors["ilp_value"]), rel=1e-12)
    assert budget.cost(counts, found) == int(vectors["ilp_used_bits"])
    assert weight_bits(allocate(gains((7 * enbg).tolist()), counts, [budget])) == weight_bits(found)  # scale-free


def brute_force(sensitivities, counts, budgets) -> float:
    """The least total of all allocations within the budgets."""
    names = list(sensitivities)
    allocations = (
        Allocation(dict(zip(names, picks, strict=True))) for picks in itertools.product(*sensitivities.values())
    )
    return min(total(sensitivities, a) for a in allocations if all(budget.met(counts, a) for budget in budgets))


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_brute_force(seed):
    draw = random.Random(seed)
    counts = counts_of(*([draw.randint(1, 300) for _ in range(4)] for _ in range(3)))
    widths = [LayerBits(w, a) for w in (0, 2, 3, 8) for a in (2, 4, 8)]
    sensitivities = {
        layer.name: {bits: draw.choice((1e-6, 1.0, 50.0)) * draw.gauss(0, 1) for bits in draw.sample(widths, 3)}
        for layer in counts.layers
    }
    free = {name: list(options) for name, options in sensitivities.items()}
    budgets = []
    for kind in draw.sample(("average_bits", "size", "bops", "activation_memory", "activation_max"), 2):
        convention = CostConvention(form=draw.choice(("product", "uniq")), input_bits=draw.choice((None, 8)))
        low, high = Budget(kind, 1, convention).feasible(counts, free)
        budgets.append(Budget(kind, low + draw.random() * (high - low) or 1, convention))
    best = brute_force(sensitivities, counts, budgets)
    found = allocate(sensitivities, counts, budgets)
    assert total(sensitivities, found) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert all(budget.met(counts, found) for budget in budgets)
    assert allocate(sensitivities, counts, budgets) == found


def test_a_budget_is_met_to_the_bit():
    sizes = [268336, 36864, 9216, 2304, 640]
    values = [0.5, 0.4, 0.3, 0.1, 0.2]
    counts, whole = counts_of(sizes), 4 * sum(sizes)
    assert weight_bits(allocate(gains(values), counts, [Budget("size", whole, PLAIN)])) == [4] * 5
    just_below = Budget("size", whole - 1, PLAIN)
    assert weight_bits(allocate(gains(values), counts, [just_below])) == [4, 4, 4, 2, 4]  # the least ENBG, whatever N
    least = Budget("size", whole / 2, PLAIN)
    assert weight_bits(allocate(gains(values), counts, [least])) == [2] * 5
    tight = Budget("average_bits", (whole - 2 * 640 - 2 * 2304) / sum(sizes), PLAIN)
    assert weight_bits(allocate(gains([5, 4, 3, 0.1, 0.1]), counts, [tight])) == [4, 4, 4, 2, 2]


def test_what_the_solvers_tolerance_lets_pass_is_ruled_out():
    counts = counts_of([50, 50])
    budget = Budget("average_bits", float(np.nextafter(3, 0)), PLAIN)
    assert weight_bits(allocate(gains([1.0, 2.0]), counts, [budget])) == [2, 2]
    assert weight_bits(allocate(gains([1.0, 2.0]), counts, [Budget("average_bits", 3, PLAIN)])) == [2, 4]


def test_many_layers_keep_to_the_bit():
    draw = random.Random(3)
    sizes = [draw.randint(1000, 2_000_000) for _ in range(40)]
    values = [draw.random() for _ in sizes]
    budget = Budget("size", 3 * sum(sizes) + 1, PLAIN)
    found = allocate(gains(values, (2, 3, 4, 8)), counts_of(sizes), [budget])
    assert 0.999 * budget.value < budget.cost(counts_of(sizes), found) <= budget.value


def test_more_sensitive_layers_never_get_fewer_bits():
    counts = counts_of([100] * 4)
    budget = Budget("average_bits", 3, PLAIN)
    equal = weight_bits(allocate(gains([1.0] * 4), counts, [budget]))
    assert sorted(equal) == [2, 2, 4, 4]
    before = 2
    for value in (0.1, 0.5, 1.5, 3.0):
        now = weight_bits(allocate(gains([1.0, value, 2.0, 0.3]), counts, [budget]))[1]
        assert now >= before
        before = now
    assert before == 4


def test_of_equal_allocations_the_current_one_is_kept():
    counts, budget = counts_of([100] * 4), Budget("average_bits", 3, PLAIN)
    for picks in itertools.permutations((2, 2, 4, 4)):
        current = Allocation({f"l{i}": (b, b) for i, b in enumerate(picks)})
        assert allocate(gains([1.0] * 4), counts, [budget], current) == current
        better = allocate(gains([2.0, 2.0, 1.0, 1.0]), counts, [budget], current)
        assert weight_bits(better) == [4, 4, 2, 2]
    over = Allocation({f"l{i}": (4, 4) for i in range(4)})
    assert budget.met(counts, allocate(gains([0.0] * 4), counts, [budget], over))
    foreign = Allocation({f"l{i}": (3, 3) for i in range(4)})
    assert 3 not in weight_bits(allocate(gains([0.0] * 4), counts, [budget], foreign))


def test_fixed_layers_stay_and_count():
    counts = counts_of([10, 100, 100, 10])
    sensitivities = gains([1.0] * 4)
    sensitivities["l0"] = sensitivities["l3"] = {LayerBits(8, 8): 0.0}
    found = allocate(sensitivities, counts, [Budget("size", 2 * 80 + 200 + 400, PLAIN)])
    assert weight_bits(found)[0] == weight_bits(found)[3] == 8 and sorted(weight_bits(found)[1:3]) == [2, 4]
    only = {name: {LayerBits(8, 8): 0.0} for name in sensitivities}
    assert weight_bits(allocate(only, counts, [Budget("average_bits", 8, PLAIN)])) == [8] * 4


def test_budgets_that_cannot_be_met():
    counts = counts_of([100, 100])
    with pytest.raises(ValueError, match=r"^budget\.value=1\.5: feasible are 2 to 4 bits per weight$"):
        allocate(gains([1.0, 1.0]), counts, [Budget("average_bits", 1.5, PLAIN)])
    trade = {name: {LayerBits(2, 8): 0.0, LayerBits(8, 2): 0.0} for name in ("l0", "l1")}
    budgets = [
        Budget("size", 500, PLAIN, "budget[0]"),
        Budget("activation_memory", 900, PLAIN, "budget[1]"),
    ]
    with pytest.raises(
        ValueError, match=r"budget\[0\]\.value=500 \(400 to 1600 .*budget\[1\]\.value=900 \(400 to 1600"
    ):
        allocate(trade, counts, budgets)
    broken = gains([1.0, float("nan")])
    with pytest.raises(ValueError, match="sensitivity of l1 at W2A2 is nan"):
        allocate(broken, counts, budgets[:1])


def test_the_uniform_allocation():
    counts = counts_of([10, 100, 100, 10])
    free = [LayerBits(b, b) for b in (4, 2, 3)]
    choices = {"l0": [LayerBits(8, 8)], "l1": free, "l2": free, "l3": [LayerBits(8, 8)]}
    inner = CostConvention(first_last="excluded")
    assert weight_bits(uniform(choices, counts, [Budget("average_bits", 3, inner)])) == [8, 3, 3, 8]
    assert weight_bits(uniform(choices, counts, [Budget("average_bits", 3, PLAIN)])) == [8, 2, 2, 8]  # the ends count
    both = [Budget("average_bits", 4, inner), Budget("activation_max", 300, inner)]
    assert weight_bits(uniform(choices, counts, both)) == [8, 3, 3, 8]
    with pytest.raises(ValueError, match=r"^budget\.value=1: feasible for one width are 2 to 4 bits per weight$"):
        uniform(choices, counts, [Budget("average_bits", 1, inner)])
    apart = {**choices, "l2": [LayerBits(6, 6), LayerBits(8, 8)]}
    with pytest.raises(ValueError, match=r"^bits=: the layers have no candidate in common"):
        uniform(apart, counts, [Budget("average_bits", 3, inner)])
    fixed = {name: [LayerBits(8, 8)] for name in choices}
    assert weight_bits(uniform(fixed, counts, [Budget("average_bits", 8, PLAIN)])) == [8] * 4
