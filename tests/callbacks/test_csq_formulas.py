"""CSQ's formulas: golden vectors of the official layers, the identities of bit planes, the penalty, what stays at last.

"check N" is the N-th cheap check of the method's specification.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import conv2d

from callbacks.csq.planes import (
    hard_codes,
    plane_weights,
    prune,
    soft_weight,
    spans,
    split,
    temperature,
    width_of,
)
from callbacks.csq.quantizer import GatedPlanes
from callbacks.csq.selection import gate_excess, gate_penalty, settled, span_excess
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.cost import LayerCost
from research.quant.cost_table import CostTable
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ

DOUBLE = torch.float64
Vectors = dict[str, Tensor]


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> Vectors:
    return {name: torch.from_numpy(value) for name, value in golden("csq").items()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-8, atol=1e-12)


def planes_first(digits: Tensor) -> Tensor:
    """The official layout has the planes last."""
    return digits.movedim(-1, 0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def gated(w: Tensor, planes: int, logit: float | None = None) -> GatedPlanes:
    """The quantizer, in float64, holding ``w``."""
    source = LSQ(QuantizerSpec("lsq", 4, signed=True), w.shape, None, "weight")
    found = GatedPlanes(source, planes, logit).double()
    found.initialise(w)
    return found


def test_golden_convolution_and_the_gradients_of_its_loss(vectors: Vectors) -> None:
    case = {key.removeprefix("conv_"): value for key, value in vectors.items() if key.startswith("conv_")}
    leaves = {name: case[name].clone().requires_grad_() for name in ("pbits", "nbits", "maskp", "scale", "x")}
    gates = torch.sigmoid(case["temp"] * leaves["maskp"])
    same(gates, case["mask"])
    stacks = planes_first(leaves["pbits"]), planes_first(leaves["nbits"])
    weight = soft_weight(*stacks, gates, leaves["scale"], case["temp"], case["bitweights"])
    out = conv2d(leaves["x"], weight, padding=1)
    same(out, case["out"])
    opened = (leaves["maskp"].detach() >= 0)[None]
    excess = gate_excess(opened, float(case["target_bits"]))
    same(opened.double().mean(), case["ratio_one"])
    same(gate_penalty(leaves["maskp"], case["temp"], torch.ones(()), 1.0), case["reg"])
    penalty = gate_penalty(leaves["maskp"], case["temp"], excess, float(case["lambda"]))
    loss = (out * case["gout"]).sum() + penalty
    same(loss, case["loss"])
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        same(gradient, case[f"grad_{name}"])
    hard = soft_weight(*stacks, (case["maskp"] > 0).to(DOUBLE), case["scale"], case["temp"], case["bitweights"])
    same(conv2d(case["x"], hard, padding=1), case["out_hardmask"])


def test_golden_penalty_where_its_coefficient_is_not_zero(vectors: Vectors) -> None:
    gates = vectors["conv_maskp"].clone().requires_grad_()
    excess = gate_excess((gates.detach() >= 0)[None], 1.0)
    penalty = gate_penalty(gates, vectors["conv_temp"], excess, float(vectors["conv_lambda"]))
    (gradient,) = torch.autograd.grad(penalty, gates)
    expected = torch.tensor([0.00188325, 0.00231194, 0.00191555, 0.00231104], dtype=DOUBLE)  # the specification's
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-9)


def test_golden_linear_weights_at_three_temperatures(vectors: Vectors) -> None:
    stacks = planes_first(vectors["lin_pbits"]), planes_first(vectors["lin_nbits"])
    for beta, expected in zip(vectors["lin_temps"], vectors["lin_weff"], strict=True):
        gates = torch.sigmoid(beta * vectors["lin_maskp"])
        same(soft_weight(*stacks, gates, vectors["lin_scale"], beta, vectors["conv_bitweights"]), expected)


def test_golden_digits_of_a_float_weight(vectors: Vectors) -> None:
    positive, negative, scale = split(vectors["init_w"], vectors["init_pbits"].shape[-1])
    same(positive, planes_first(vectors["init_pbits"]))
    same(negative, planes_first(vectors["init_nbits"]))
    same(scale.reshape(1), vectors["init_scale"])


def test_golden_plane_weights(vectors: Vectors) -> None:
    expected = vectors["conv_bitweights"]  # the official ones are rounded to float32
    torch.testing.assert_close(plane_weights(len(expected)), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("planes", [1, 2, 4, 7])
def test_saturated_planes_give_the_scale(planes: int) -> None:  # check 1
    weights = plane_weights(planes)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-15)
    big = torch.full((planes, 3), 1e3, dtype=DOUBLE)
    ones, scale, beta = torch.ones(planes, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE), torch.ones(())
    same(soft_weight(big, -big, ones, scale, beta, weights), torch.full((3,), 0.7, dtype=DOUBLE))
    p, n, gates = drawn(planes, 3), drawn(planes, 3, seed=1), torch.sigmoid(drawn(planes, seed=2))
    one, other = (soft_weight(*stacks, gates, scale, beta, weights) for stacks in ((p, n), (n, p)))
    assert torch.equal(one, -other)


def test_digits_as_logits_give_a_shrunk_weight() -> None:  # check 2
    w = drawn(5, 4)
    planes = gated(w, 4)
    planes.mask.fill_(1)
    planes.hard.fill_(True)
    step = w.abs().max() / 15
    shrink = 1 / (1 + math.exp(-1)) - 0.5
    assert shrink == pytest.approx(0.231059, abs=1e-6)
    torch.testing.assert_close(planes(w).detach(), shrink * step * torch.round(w / step), rtol=1e-6, atol=1e-8)
    assert torch.equal(planes.codes(w), torch.round(w / step).to(torch.int32))


def test_a_logit_for_both_digits() -> None:
    w = drawn(5, 4)
    planes = gated(w, 4, logit=2.0)
    planes.mask.fill_(1)
    planes.hard.fill_(True)
    step = w.abs().max() / 15
    torch.testing.assert_close(planes(w).detach(), math.tanh(1.0) * step * torch.round(w / step), rtol=1e-6, atol=1e-8)
    assert torch.equal(planes.codes(w), torch.round(w / step).to(torch.int32))


def test_derivatives_are_exact() -> None:  # check 3
    inputs = [value.requires_grad_() for value in (drawn(3, 4), drawn(3, 4, seed=1), drawn(3, seed=2), drawn(1).abs())]

    def weight(p: Tensor, n: Tensor, m: Tensor, s: Tensor) -> Tensor:
        beta = torch.tensor(2.5, dtype=DOUBLE)
        return soft_weight(p, n, torch.sigmoid(beta * m), s, beta, plane_weights(3))

    assert gradcheck(weight, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_a_cold_weight_is_the_exact_one() -> None:  # check 4
    planes = gated(drawn(6, 5), 5)
    for seed, parameter in enumerate((planes.positive, planes.negative, planes.gates)):
        logits = drawn(*parameter.shape, seed=seed + 3)
        parameter.data.copy_(torch.where(logits.abs() < 0.1, 0.1, logits))
    planes.gates.data.copy_(torch.tensor([-1.0, 0.5, 0.1, 2.0, -0.1]))
    planes.beta.fill_(200)
    codes, scale = planes.codes(planes.positive), planes.raw_scale.detach()
    assert (planes(planes.positive) - codes * planes.scale).abs().max() < 1e-6 * scale
    units = codes * planes.scale / scale * 31
    assert torch.equal(hard_codes(planes.positive, planes.negative, planes.opened()), units.flatten().round().int())
    assert int(units.abs().max()) <= 31
    planes.settle_bits()
    assert int(planes.bits) == 4  # planes 2 to 4, and the sign
    assert len(codes.unique()) <= 2**4 - 1 and int(codes.abs().max()) <= 7


@pytest.mark.parametrize(("excess", "moved"), [(-0.1, 1.0), (0.1, -1.0), (0.0, 0.0)])
def test_the_penalty_seeks_the_budget(excess: float, moved: float) -> None:  # check 5
    gates = drawn(3, 4).requires_grad_()
    penalty = gate_penalty(gates, torch.tensor(3.0, dtype=DOUBLE), torch.tensor(excess), 0.1)
    (gradient,) = torch.autograd.grad(penalty, gates)
    assert torch.equal(torch.sign(-gradient), torch.full((3, 4), moved, dtype=DOUBLE))


def test_the_temperature_at_three_times() -> None:  # check 6
    assert temperature(0.0, 200.0) == 1.0
    assert temperature(1.0, 200.0) == 200.0
    assert temperature(0.5, 200.0) == pytest.approx(14.142, abs=1e-3)
    assert temperature(1.1, 200.0) > 200.0


@pytest.mark.parametrize("beta_max", [1.0, 1.5, 200.0, 1e4])
def test_the_temperature_grows_as_long_as_it_is_a_number(beta_max: float) -> None:
    for progress in (0.0, 0.3, 1.0, 1.5):
        assert temperature(progress, beta_max) == beta_max**progress
    for progress in (20.0, 1e6):
        assert bool(torch.tensor(temperature(progress, beta_max)).isfinite())


def test_open_gates_are_undecided_again_and_closed_ones_stay() -> None:  # check 7
    gates = torch.tensor([-0.3, 0.4])
    assert torch.equal(prune(gates, 1.0), torch.tensor([-0.3, 0.0]))
    assert torch.equal(prune(gates, 10.0), torch.tensor([-3.0, 0.0]))


@pytest.mark.parametrize(
    ("opened", "span", "bits"),
    [([1, 0, 1, 1], 4, 5), ([0, 1, 1, 0], 2, 3), ([0, 0, 1, 0], 1, 2), ([0, 0, 0, 0], 0, 0), ([1, 1, 1, 1], 4, 5)],
)
def test_a_gap_costs_a_plane_and_the_sign_a_bit(opened: list[int], span: int, bits: int) -> None:
    found = spans(torch.tensor([opened], dtype=torch.bool))
    assert found.tolist() == [span]
    assert width_of(span) == bits
    planes = gated(drawn(4, 4), 4, logit=1.0)
    planes.fix(torch.tensor(opened, dtype=torch.bool))
    codes = planes.codes(planes.positive)
    assert int(planes.bits) == bits
    assert int(codes.abs().max()) <= 2**span - 1
    hard = hard_codes(planes.positive, planes.negative, planes.opened()).reshape(codes.shape)
    torch.testing.assert_close(codes * planes.scale, hard * planes.raw_scale.detach() / 15)


def sizes(*weights: int) -> Counts:
    """A network of layers l0, l1, ... with these numbers of weights."""
    bits = torch.tensor(32.0)
    layers = [LayerCost(f"l{i}", n, n, n, 1, 9, 0, 0, bits, bits) for i, n in enumerate(weights)]
    return Counts(tuple(layers), "l0", f"l{len(weights) - 1}")


def test_the_table_of_costs_is_the_cost_of_the_budget() -> None:
    counts = sizes(100, 30, 7)
    ladder = [LayerBits(width_of(span), 4) for span in range(5)]
    choices = {"l0": [LayerBits(8, 8)], "l1": ladder, "l2": ladder}
    budgets = [Budget("average_bits", 5), Budget("bops", 4000)]
    table = CostTable.of(budgets, counts, choices, ["l1", "l2"])

    def relative(budget: Budget, spans: tuple[int, int]) -> float:
        present, widest = (
            budget.cost(counts, Allocation({"l0": LayerBits(8, 8), "l1": ladder[one], "l2": ladder[other]}))
            for one, other in (spans, (4, 4))
        )
        return (present - budget.value) / widest

    for chosen in ((4, 4), (2, 3), (0, 1)):
        expected = max(relative(budget, chosen) for budget in budgets)
        assert float(span_excess(table, torch.tensor(chosen))) == pytest.approx(expected, rel=1e-6)


def test_with_gates_on_all_weights_it_is_the_share_of_the_model() -> None:  # the reconstruction named in the card
    counts, ladder = sizes(100, 30), [LayerBits(width_of(span), 4) for span in range(5)]
    table = CostTable.of([Budget("average_bits", 3)], counts, {"l0": ladder, "l1": ladder}, ["l0", "l1"])
    average = (100 * 4 + 30 * 2) / 130
    assert float(span_excess(table, torch.tensor([3, 1]))) == pytest.approx((average - 3) / 5, rel=1e-6)


def test_what_stays_is_what_is_open_where_that_fits() -> None:
    gates = {"l0": [0.3, -0.1, 0.2], "l1": [-0.5, -0.2, -0.9]}
    assert settled(gates, 1, lambda widths: True) == {"l0": [True, False, True], "l1": [False, True, False]}
    assert settled(gates, 0, lambda widths: True)["l1"] == [False, False, False]


def test_planes_beyond_the_budget_are_closed_from_the_ends_the_weakest_first() -> None:
    gates = {"l0": [0.3, 0.05, 0.2], "l1": [0.9, 0.1, 0.8]}
    seen = []

    def fits(widths: dict[str, int]) -> bool:
        seen.append(dict(widths))
        return sum(widths.values()) <= 5

    found = settled(gates, 1, fits)  # type: ignore[arg-type]
    assert [(widths["l0"], widths["l1"]) for widths in seen] == [(4, 4), (3, 4), (2, 4), (2, 3)]
    assert found == {"l0": [True, False, False], "l1": [True, True, False]}
