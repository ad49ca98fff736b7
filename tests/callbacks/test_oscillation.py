"""Tracking, freezing and dampening as formulas: sequences done by hand, limits, and what frozen codes do to a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.oscillation.dampening import dampening_loss
from callbacks.oscillation.freezing import OscillationFreezing
from callbacks.oscillation.frozen import FreezableHistory, Freezing, FrozenCodes, freeze, nearest_code
from callbacks.oscillation.history import CodeHistory
from callbacks.oscillation.schedule import annealed
from research.quant.layers import QuantLinear
from research.quant.oscillation import Oscillation, start, track
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.lsq import lsq_gradient_factor


def tracked(sequence: list[int], momentum: float) -> list[Oscillation]:
    state = start(torch.tensor(sequence[0]), torch.float64)
    states = [state]
    for code in sequence[1:]:
        state = track(state, torch.tensor(code), momentum)
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("sequence", "counts"),
    [([0, 1, 0, 1, 0], [0, 0, 1, 2, 3]), ([0, 1, 2, 3], [0, 0, 0, 0]), ([0, 1, 1, 1, 0], [0, 0, 0, 0, 1])],
)
def test_only_a_change_back_counts(sequence: list[int], counts: list[int]) -> None:  # cheap check 1
    assert [int(state.oscillations) for state in tracked(sequence, 0.5)] == counts


def test_the_frequency_of_a_short_sequence() -> None:  # cheap check 1
    assert [float(state.frequency) for state in tracked([0, 1, 0, 1, 0], 0.5)] == [0, 0, 0.5, 0.75, 0.875]


def test_alternating_codes_cross_the_threshold_after_106_oscillations() -> None:  # cheap check 2
    states = tracked([step % 2 for step in range(120)], 0.001)
    for state in states:
        assert float(state.frequency) == pytest.approx(1 - 0.999 ** int(state.oscillations), rel=1e-10)
    assert min(int(state.oscillations) for state in states if float(state.frequency) > 0.1) == 106


def test_the_history_keeps_what_the_formula_says_and_starts_anew_at_another_width() -> None:
    torch.manual_seed(0)
    sequence = torch.randint(-2, 2, (30, 5), dtype=torch.int32)
    bits = torch.tensor(2.0)
    history, state = CodeHistory(torch.zeros(5), bits), start(sequence[0])
    history.begin(sequence[0])
    for codes in sequence[1:]:
        history.look(codes, bits, 0.1)
        state = track(state, codes, 0.1)
    for name, value in state._asdict().items():
        torch.testing.assert_close(getattr(history, name).to(value.dtype), value)
    assert int(history.oscillations.sum()) > 0
    history.look(4 * sequence[0], bits + 1, 0.1)
    assert torch.equal(history.codes, (4 * sequence[0]).short())
    assert not any(bool(getattr(history, name).any()) for name in ("direction", "frequency", "oscillations"))


# -- freezing ------------------------------------------------------------------------------------------------------


def test_a_weight_freezes_at_the_code_it_had_most() -> None:  # cheap check 4
    momentum, found = 0.05, {}
    sequence = [torch.tensor([float(step % 5 != 4)]) for step in range(100)]  # 1 in 80 % of the steps
    assert float(sequence[-1]) == 0
    for freeze_to in ("average", "current"):
        state = start(sequence[0], torch.float64)
        freezing = Freezing(torch.tensor([False]), torch.zeros(1), sequence[0].double())
        for step, codes in enumerate(sequence[1:], start=1):
            state = track(state, codes, momentum)
            threshold = 0.1 if step == len(sequence) - 1 else 1.0
            freezing = freeze(freezing, codes, state.frequency, momentum, threshold, freeze_to)  # type: ignore[arg-type]
        found[freeze_to] = (bool(freezing.frozen), float(freezing.frozen_codes))
    assert found == {"average": (True, 1.0), "current": (True, 0.0)}


def test_frozen_codes_never_change() -> None:
    before = Freezing(torch.tensor([True]), torch.tensor([2.0]), torch.tensor([2.0]))
    after = freeze(before, torch.tensor([-1.0]), torch.tensor([0.9]), 0.5, 0.1, "current")
    assert (bool(after.frozen), float(after.frozen_codes)) == (True, 2.0)


def test_midrise_codes_are_odd() -> None:
    values = torch.tensor([-2.6, -0.4, 0.2, 1.9, 2.1])
    assert nearest_code(values, "midrise").tolist() == [-3, -1, 1, 1, 3]
    assert nearest_code(values).tolist() == [-3, 0, 0, 2, 2]


def frozen_layer(name: str = "lsq", **options: Any) -> tuple[QuantLinear, FreezableHistory]:
    """A linear layer (2, 6) at 3 bits, the first column frozen at -1."""
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(6, 2, bias=False)).double()
    quantizer = build_quantizer(QuantizerSpec(name, 3, options=options), layer.weight.shape, 0, "weight").double()
    quantizer.initialise(layer.weight)
    layer.weight_quantizer = quantizer
    history = FreezableHistory(layer.weight, quantizer.bits)
    history.frozen[:, 0] = True
    history.frozen_codes[:, 0] = -1
    layer.weight_override = FrozenCodes(history)
    return layer, history


def gradients(layer: QuantLinear, upstream: Tensor) -> tuple[Tensor, Tensor]:
    scale: Any = layer.weight_quantizer.raw_scale  # type: ignore[union-attr]
    return torch.autograd.grad((layer.quantized_weight() * upstream).sum(), [layer.weight, scale])  # type: ignore[return-value]


@pytest.mark.parametrize("gradient_factor", [False, True])
def test_a_frozen_element_follows_the_scale_alone(gradient_factor: bool) -> None:  # cheap check 3
    layer, history = frozen_layer(gradient_factor=gradient_factor)
    quantizer: Any = layer.weight_quantizer
    upstream = torch.randn(2, 6, dtype=torch.float64)
    one = layer.quantized_weight().detach()
    slope, of_scale = gradients(layer, upstream * history.frozen)
    assert not slope.any()
    factor = lsq_gradient_factor(12, torch.tensor(3.0)) if gradient_factor else 1.0
    torch.testing.assert_close(of_scale, factor * (upstream * history.frozen_codes).sum(), rtol=1e-7, atol=0)
    with torch.no_grad():
        layer.weight[:, 0] += 5
        torch.testing.assert_close(layer.quantized_weight(), one, rtol=0, atol=0)
        quantizer.raw_scale *= 2
    torch.testing.assert_close(layer.quantized_weight()[:, 0], 2 * one[:, 0])


def test_the_others_are_as_without_freezing() -> None:
    layer, history = frozen_layer()
    upstream = torch.randn(2, 6, dtype=torch.float64) * ~history.frozen
    found = [layer.quantized_weight()[:, 1:], *gradients(layer, upstream)]
    layer.weight_override = None
    expected = [layer.quantized_weight()[:, 1:], *gradients(layer, upstream)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["relax", "identity"])
def test_modes_without_codes_pass(mode: Any) -> None:
    layer, _ = frozen_layer()
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.mode = mode
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(layer.weight))


# -- dampening -----------------------------------------------------------------------------------------------------

SCALE, QMIN, QMAX = torch.tensor(0.25, dtype=torch.float64), torch.tensor(-4.0), torch.tensor(3.0)


def test_bin_centres_and_the_far_outside_are_not_dampened() -> None:  # cheap check 5
    for values in (SCALE * torch.arange(-4, 4), torch.tensor([-7.0, 5.0], dtype=torch.float64)):
        weight = values.clone().requires_grad_()
        loss = dampening_loss(weight, SCALE, QMIN, QMAX, "sum")
        loss.backward()
        assert float(loss.detach()) == 0 and not weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(("aggregation", "divisor"), [("sum", 1), ("mean", 5 * 4 * 9), ("kernel_mean", 4 * 9)])
def test_the_slope_of_dampening(aggregation: Any, divisor: int) -> None:  # cheap checks 5 and 6
    torch.manual_seed(0)
    weight = (0.5 * torch.randn(5, 4, 3, 3, dtype=torch.float64)).requires_grad_()
    loss = dampening_loss(weight, SCALE, QMIN, QMAX, aggregation)
    (slope,) = torch.autograd.grad(loss, weight)
    inside = (weight >= SCALE * QMIN) & (weight <= SCALE * QMAX)
    quantized = SCALE * torch.clamp(torch.round(weight / SCALE), QMIN, QMAX)
    assert bool(inside.any()) and not bool(inside.all())
    torch.testing.assert_close(slope, inside * 2 * (weight - quantized) / divisor, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss, dampening_loss(weight, SCALE, QMIN, QMAX, "sum") / divisor, rtol=1e-12, atol=0)


# -- schedules -----------------------------------------------------------------------------------------------------


def test_schedules_at_their_corners() -> None:  # cheap check 7
    total = 1000
    freezing = OscillationFreezing(threshold_start=0.1, threshold_final=0.02)
    found = [freezing.threshold(step, total) for step in (1, 249, 250, 625, 1000)]
    assert found == pytest.approx([0, 0, 0.1, 0.06, 0.02])
    dampening = [annealed(step, total, 0.0, 0.1, 0.25) for step in (1, 249, 250, 625, 1000)]
    assert dampening == pytest.approx([0, 0, 0, 0.05, 0.1])
    constant = OscillationFreezing(threshold_start=0.1, threshold_final=0.1, warmup=0.0)
    assert {constant.threshold(step, total) for step in (1, 500, 1000)} == {0.1}
