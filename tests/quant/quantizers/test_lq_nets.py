"""LQ-Nets: the official code's sequences of training steps, and what the method promises."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from research.learning.evaluation import cloned_buffers
from research.quant.convert import convert
from research.quant.passes import passes
from research.quant.quantizers import QuantizerSpec, build_quantizer, lq_nets
from research.quant.quantizers.lq_nets import (
    CODEBOOK,
    QUARTILE,
    WEIGHT_RIDGE,
    LQNets,
    initial_basis,
    least_squares_basis,
    level_sums,
    levels,
    nearest,
    nearest_level,
)
from research.quant.recipe import Recipe

Golden = dict[str, np.ndarray]
TAGS = ("w1", "w2", "w3", "a1", "a2", "a3")
SIGNED, UNSIGNED = torch.tensor(True), torch.tensor(False)


def make(role: str, bits: int, shape: tuple[int, ...] = (), **options: Any) -> LQNets:
    granularity = "channel" if role == "weight" and shape else "tensor"
    spec = QuantizerSpec("lq_nets", bits, granularity=granularity, options=options)
    quantizer = build_quantizer(spec, shape, 0 if role == "weight" else None, role)
    assert isinstance(quantizer, LQNets)
    return quantizer


def with_basis(quantizer: LQNets, *basis: float) -> LQNets:
    quantizer.basis = torch.tensor(basis, dtype=torch.float64)
    return quantizer.double()


def error(x: Tensor, basis: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error at the nearest levels, and the digits of their codes."""
    values, digits = levels(basis, signed)
    index = nearest(x, values)
    return (x - values[index]).square().sum(), digits[index]


def moved(x: Tensor, basis: Tensor, signed: Tensor, ridge: float, axis: int | None = None) -> Tensor:
    """The least-squares basis for the codes that ``basis`` gives."""
    values, digits = levels(basis, signed)
    return least_squares_basis(*level_sums(x, values, axis), digits, basis.double(), ridge)


# -- golden vectors ------------------------------------------------------------------------------------------------


def steps(golden: Golden, tag: str) -> list[tuple[Tensor, ...]]:
    """``(x, basis, next basis, y, upstream, gradient, v*)`` of every step, channels first."""
    weight = tag.startswith("w")

    def data(name: str) -> Tensor:
        array = torch.from_numpy(golden[f"{tag}_{name}"])
        return array.permute(0, 4, 3, 1, 2) if weight else array

    def basis(name: str) -> Tensor:  # [S, K, C] -> [S, C, 1, 1, 1, K] or [S, K]
        array = torch.from_numpy(golden[f"{tag}_{name}"]).transpose(1, 2)
        return array[:, :, None, None, None] if weight else array[:, 0]

    bases = basis("basis")
    return list(zip(data("x"), bases, bases[1:], data("y"), data("upstream"), data("grad"), basis("lsq"), strict=False))


@pytest.mark.parametrize("tag", TAGS)
def test_golden_training_steps(golden: Callable[[str], Golden], tag: str) -> None:
    """Float32, as the official functions computed them: every output, gradient and basis of a sequence."""
    sequence = steps(golden("lq_nets"), tag)
    weight = tag.startswith("w")
    shape = tuple(sequence[0][0].shape) if weight else ()
    quantizer = make("weight" if weight else "input", int(tag[1]), shape)
    spread = torch.full(quantizer.state_shape, (2 / (9 * shape[0])) ** 0.5 if weight else 1.0)
    quantizer.basis.copy_(initial_basis(spread, int(tag[1]), quantizer.signed).view_as(quantizer.basis))
    for x, basis, after, y, upstream, grad, _ in sequence:
        torch.testing.assert_close(quantizer.basis, basis.view_as(quantizer.basis), rtol=1e-5, atol=1e-6)
        quantizer.basis.copy_(
            basis.view_as(quantizer.basis)
        )  # a value beside a midpoint shall not hang on the last bit
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf)
        torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], grad)
        torch.testing.assert_close(quantizer.basis, after.view_as(quantizer.basis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tag", TAGS)
def test_golden_least_squares(golden: Callable[[str], Golden], tag: str) -> None:
    """Float64: the solution of every step, from the codes of its basis."""
    for x, basis, _, _, _, _, solution in steps(golden("lq_nets"), tag):
        weight = tag.startswith("w")
        ridge, axis = (WEIGHT_RIDGE, 0) if weight else (0.0, None)
        found = moved(x, basis, torch.tensor(weight), ridge, axis)
        torch.testing.assert_close(found, solution, rtol=1e-8, atol=1e-10)


# -- cheap checks, in the order of the specification ---------------------------------------------------------------


def test_one_bit_is_the_mean_magnitude() -> None:
    x = torch.randn(50, dtype=torch.float64)
    basis = torch.tensor([0.6], dtype=torch.float64)
    values, _ = levels(basis, SIGNED)
    assert values.tolist() == [-0.6, 0.6]
    assert torch.equal(nearest(x, values) == 1, x > 0)
    found = moved(x, basis, SIGNED, WEIGHT_RIDGE)
    expected = (x.abs().sum() + WEIGHT_RIDGE * 0.6) / (50 + WEIGHT_RIDGE)
    torch.testing.assert_close(found, expected.reshape(1), rtol=1e-14, atol=0)


def test_powers_of_two_are_a_uniform_quantizer() -> None:
    basis = torch.tensor([1.0, 2.0])
    assert levels(basis, SIGNED)[0].tolist() == [-3, -1, 1, 3]
    assert levels(basis, UNSIGNED)[0].tolist() == [0, 1, 2, 3]
    x = 4 * torch.rand(200, dtype=torch.float64)
    assert torch.equal(with_basis(make("input", 2), 1.0, 2.0).eval()(x), torch.round(x).clamp(0, 3))


@pytest.mark.parametrize("signed", [SIGNED, UNSIGNED], ids=["weights", "inputs"])
def test_a_step_never_adds_to_the_error(signed: Tensor) -> None:
    data = torch.randn(300, dtype=torch.float64)
    x, basis = data if signed else data.relu(), torch.tensor([0.2, 0.7, 1.1], dtype=torch.float64)
    for _ in range(5):
        before, digits = error(x, basis, signed)
        better = moved(x, basis, signed, WEIGHT_RIDGE if signed else 0.0)
        rebuilt = (x - digits @ better).square().sum()
        after, _ = error(x, better, signed)
        assert after <= rebuilt * (1 + 1e-12) <= before * (1 + 1e-11)
        basis = better


@pytest.mark.parametrize(
    ("signed", "bits", "expected", "mse"),
    [
        (SIGNED, 1, [0.7979], 0.3634),
        (SIGNED, 2, [0.529, 0.982], 0.1175),
        (SIGNED, 3, None, 0.0369),
        (UNSIGNED, 1, [1.224], 0.0951),
        (UNSIGNED, 2, [0.652, 1.300], 0.0234),
    ],
)
def test_fixed_points_of_a_gaussian(signed: Tensor, bits: int, expected: list[float] | None, mse: float) -> None:
    share = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    x = torch.special.ndtri(share) if signed else torch.special.ndtri(share).relu()
    basis = initial_basis(torch.tensor(1.0, dtype=torch.float64), bits, signed)
    for _ in range(200):
        basis = moved(x, basis, signed, 0.0)
    assert float(error(x, basis, signed)[0] / len(x)) == pytest.approx(mse, rel=5e-3)
    if expected is not None:
        assert basis.tolist() == pytest.approx(expected, rel=5e-3)


def test_the_order_of_the_basis_permutes_the_codes_only() -> None:
    x = torch.randn(100)
    (one, digits), (other, permuted) = (levels(torch.tensor(basis), SIGNED) for basis in ([1.0, 2.0], [2.0, 1.0]))
    assert torch.equal(one, other) and torch.equal(digits, permuted.flip(-1))
    outputs = [with_basis(make("weight", 2), *basis).eval()(x) for basis in ([1.0, 2.0], [2.0, 1.0])]
    assert torch.equal(*outputs)


def test_gradients_are_masked_above_the_top_level_of_inputs_only() -> None:
    x, upstream = torch.tensor([-9.0, 0.2, 3.0, 3.01, 9.0]).requires_grad_(), torch.randn(5)
    for role, mask in (("weight", [1, 1, 1, 1, 1]), ("input", [1, 1, 1, 0, 0])):
        quantizer = with_basis(make(role, 2), 1.0, 2.0)
        assert not list(quantizer.parameters())
        (grad,) = torch.autograd.grad(quantizer(x), x, upstream)
        assert torch.equal(grad, upstream * torch.tensor(mask))


def test_only_training_that_records_gradients_moves_the_basis() -> None:
    weights = torch.randn(4, 3, 3, 3)
    quantizer = make("weight", 2, weights.shape)
    quantizer.initialise(weights)
    start = quantizer.basis.clone()
    old = quantizer.eval()(weights)
    assert torch.equal(quantizer(weights), old)
    with torch.no_grad():
        assert torch.equal(quantizer.train()(weights), old)
    quantizer.codes(weights)
    assert torch.equal(quantizer.basis, start) and quantizer.updates == 0
    assert torch.equal(quantizer(weights), old), "the output of a training pass is that of the basis before it"
    assert not torch.equal(quantizer.basis, start) and quantizer.updates == 1


@pytest.mark.parametrize("debias", [True, False])
def test_the_first_update(debias: bool) -> None:
    x = torch.randn(1000).relu()
    quantizer = make("input", 2, debias=debias)
    quantizer.initialise(x)
    start = quantizer.basis.clone()
    target = moved(x, start, UNSIGNED, 0.0).float()
    quantizer(x)
    expected = target if debias else 0.9 * start + 0.1 * target
    torch.testing.assert_close(quantizer.basis, expected, rtol=1e-6, atol=0)
    assert start[1] == 2 * start[0] and quantizer.basis[1] != 2 * quantizer.basis[0]


# -- what the house adds -------------------------------------------------------------------------------------------


def test_two_iterations_encode_anew() -> None:
    x = torch.randn(500, dtype=torch.float64)
    bases = []
    for iterations in (1, 2):
        quantizer = with_basis(make("weight", 2, iterations=iterations), 0.2, 0.9)
        quantizer(x)
        bases.append(quantizer.basis)
    expected = moved(x, bases[0], SIGNED, WEIGHT_RIDGE)
    torch.testing.assert_close(bases[1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("role", ["weight", "input"])
def test_digits_that_always_agree_leave_the_basis_finite(role: str) -> None:
    quantizer = with_basis(make(role, 2), 0.1, 5.0)
    x = torch.tensor([5.09, 5.08, 5.10], dtype=torch.float64)  # all have the highest level
    quantizer(x)
    assert quantizer.basis.sum().item() == pytest.approx(5.09, abs=1e-3)
    assert quantizer.basis[0].item() == pytest.approx(0.1 - 0.005, abs=1e-3), "the least change that fits"
    with_basis(quantizer, 0.1, 5.0)(torch.zeros(3, dtype=torch.float64))
    assert quantizer.basis.isfinite().all()


def test_other_widths_use_the_greatest_entries_and_learn_nothing() -> None:
    quantizer = with_basis(make("input", 3), 2.0, 0.3, 1.1)
    x = 4 * torch.rand(60, dtype=torch.float64)
    for bits, kept in ((1, [2.0]), (2, [2.0, 1.1]), (5, [2.0, 0.3, 1.1])):
        quantizer.bits = torch.tensor(float(bits))
        values, _ = levels(torch.tensor(kept, dtype=torch.float64), UNSIGNED)
        assert torch.equal(quantizer.dequantize(torch.arange(len(values))), values)
        assert torch.equal(quantizer.eval()(x), values[nearest(x, values)])
    quantizer.bits = torch.tensor(2.0)
    quantizer.train()(x)
    assert quantizer.basis.tolist() == [2.0, 0.3, 1.1] and quantizer.updates == 0


def test_signed_inputs_have_levels_on_both_sides() -> None:
    quantizer = make("input", 2)
    quantizer.initialise(torch.randn(400))
    values = quantizer.scale
    assert quantizer.signed and torch.equal(values, -values.flip(0)) and values[3] > values[2] > 0
    x = torch.tensor([-9.0, -0.1, 9.0], requires_grad=True)
    assert torch.equal(torch.autograd.grad(quantizer(x).sum(), x)[0], torch.tensor([0.0, 1.0, 0.0]))


def test_levels_start_over_the_spread_of_the_data() -> None:
    weights = torch.randn(3, 400) * torch.tensor([[0.1], [1.0], [10.0]]) + 1
    quantizer = make("weight", 2, weights.shape)
    quantizer.initialise(weights)
    expected = weights.std(1, correction=0) * QUARTILE * 1.5
    torch.testing.assert_close(quantizer.scale[:, 0, 3], expected)
    inputs = make("input", 3)
    inputs.initialise(torch.randn(200_000).relu())
    assert float(inputs.scale[-1]) == pytest.approx(2 * QUARTILE, rel=1e-2)


def test_second_passes_on_cloned_buffers_and_looking_at_weights_are_silent() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    recipe = {
        "weight": {"name": "lq_nets", "bits": 2, "granularity": "channel"},
        "input": {"name": "lq_nets", "bits": 2},
    }
    convert(net, Recipe.from_config(recipe), "0", "0")
    x = torch.randn(2, 3, 6, 6)
    for quantizer, data in ((net[0].weight_quantizer, net[0].weight), (net[0].input_quantizer, x)):
        quantizer.initialise(data.detach())
    net(x)
    before = cloned_buffers(net)
    torch.func.functional_call(net, cloned_buffers(net), (x,)).sum().backward()
    with passes(net, mode="relax"):
        net(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    net(x)
    moved = [name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"basis", "average", "updates"} and len(moved) == 6


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0: use 1 or more"):
        make("weight", 2, iterations=0)
    with pytest.raises(ValueError, match="narrow=false, signed=true"):
        build_quantizer(QuantizerSpec("lq_nets", 2, signed=False), (4, 3), 0, "weight")


def test_midpoints_fall_to_the_lower_level() -> None:
    values = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    for low, high in pairwise(values.tolist()):
        middle = torch.tensor((low + high) / 2)
        assert values[nearest(middle, values)] == low
        assert values[nearest(torch.nextafter(middle, torch.tensor(9.0)), values)] == high


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [2, 5])
def test_levels_one_by_one_and_looked_up_are_the_same(
    monkeypatch: pytest.MonkeyPatch, bits: int, axis: int | None
) -> None:
    """Values bit for bit, on midpoints too; counts exactly, sums to rounding."""
    rows = (3, 1, 1) if axis == 0 else ()
    basis = initial_basis(torch.rand(rows) + 0.5, bits, SIGNED)
    values, _ = levels(basis, SIGNED)
    x = torch.randn(3, 20, 30)
    x[:, 0, : 2**bits - 1] = ((values[..., :-1] + values[..., 1:]) / 2).view(-1, 2**bits - 1)[:, :30]
    found = {}
    for few in (0, 100):
        monkeypatch.setattr(lq_nets, "FEW", few)
        found[few] = nearest_level(x, values), *level_sums(x, values, axis)
    (looked_up, counts, sums), (same, counted, added) = found.values()
    assert torch.equal(looked_up, same) and torch.equal(looked_up, CODEBOOK.values(nearest(x, values), values))
    assert torch.equal(counts, counted) and counts.sum() == x.numel()
    torch.testing.assert_close(sums, added, rtol=1e-10, atol=1e-10)
    assert sums.dtype == torch.float64
