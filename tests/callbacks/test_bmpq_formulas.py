"""BMPQ: golden vectors of quantizers and bit gradients, the identities of digits and norms, the weight quantizer."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.bmpq import MaxScale
from callbacks.bmpq.assignment import importance
from callbacks.bmpq.bit_gradients import bit_gradient, bit_norm, bit_weights, step_sensitivity
from callbacks.bmpq.mechanic import Interval
from research.quant.quantizers import QuantizerSpec, build_quantizer

DOUBLE = torch.float64
NAME = "callbacks.bmpq.MaxScale"


def digits(codes: Tensor, bits: int) -> Tensor:
    """Two's-complement digits, most significant first, of integer codes: shape (*codes.shape, bits)."""
    shifts = torch.arange(bits - 1, -1, -1)
    return (codes.to(torch.int64).unsqueeze(-1) >> shifts) & 1


def max_scale(bits: int, rule: str = "max") -> MaxScale:
    """The weight quantizer, in float64."""
    found = build_quantizer(QuantizerSpec(NAME, bits, options={"rule": rule}), (), None, "weight").double()
    assert isinstance(found, MaxScale)
    return found


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden("bmpq").items()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().to(DOUBLE), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layer", ["l0", "l1"])
def test_golden_weights_and_bit_gradients(layer: str, vectors: dict[str, Tensor]) -> None:
    case = {key.removeprefix(f"{layer}_"): value for key, value in vectors.items() if key.startswith(layer)}
    bits = int(case["q"])
    quantizer, w = max_scale(bits), case["w"].requires_grad_()
    w_q = quantizer(w)
    (gradient,) = torch.autograd.grad((w_q * case["grad_wq"]).sum(), w)
    same(w_q, case["wq"])
    same(gradient, case["grad_wq"])  # straight through
    same(quantizer.scale_of(w), case["scale"])
    assert torch.equal(quantizer.codes(w.detach()), case["int"].to(torch.int32))
    assert torch.equal(digits(case["int"], bits), case["bits"].to(torch.int64))
    same(bit_weights(bits), case["bitweight"])
    same(bit_gradient(case["grad_wq"], case["scale"], bits), case["bitgrad"])
    raw = step_sensitivity(case["grad_wq"], case["scale"]) * bit_norm(bits)
    same(raw, case["bitgrad_l2_mean"])
    same(step_sensitivity(case["grad_wq"], case["scale"]) * (2**bits - 1), case["bitgrad_l1_mean"])


def test_golden_inputs(vectors: dict[str, Tensor]) -> None:
    spec = QuantizerSpec("pact", int(vectors["pact_bits"]), signed=False, options={"alpha": 1.0})
    pact, x = build_quantizer(spec, (), None, "input").double(), vectors["pact_x"].requires_grad_()
    with torch.no_grad():
        pact.alpha.copy_(vectors["pact_alpha"])
    y = pact(x)
    grad_x, grad_alpha = torch.autograd.grad((y * vectors["pact_gout"]).sum(), (x, pact.alpha))
    same(y, vectors["pact_y"])
    same(grad_x, vectors["pact_grad_x"])
    same(grad_alpha, vectors["pact_grad_alpha"])


def averaged(steps: Tensor) -> Interval:
    interval = Interval(steps.shape[1]).double()
    for values in steps:
        interval.add(values)
    return interval


def test_golden_average_of_an_interval(vectors: dict[str, Tensor]) -> None:  # check 4
    steps = vectors["nbg_steps"]
    interval = averaged(steps)
    same(interval.mean, vectors["enbg"])
    same(averaged(steps.flip(0)).mean, vectors["enbg"])
    interval.restart(6)
    interval.add(steps[0])
    assert torch.equal(interval.mean, steps[0])
    assert int(interval.assigned_at) == 6


def test_the_digits_of_a_code_weighted_by_c_are_the_code() -> None:  # check 1
    assert [digits(torch.tensor(k), 4).tolist() for k in (-8, -1, 5)] == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]
    codes = torch.arange(-8, 8)
    assert torch.equal(digits(codes, 4).to(DOUBLE) @ bit_weights(4), codes.to(DOUBLE))


def test_a_digit_moves_the_weight_by_scale_times_c() -> None:  # check 2
    torch.manual_seed(0)
    bits, scale, eps = 4, torch.tensor(0.3, dtype=DOUBLE), 1e-6
    codes, target = torch.tensor([-8, -3, 0, 7]), torch.randn(4, dtype=DOUBLE)

    def loss(b: Tensor) -> Tensor:
        return (scale * (b @ bit_weights(bits)) - target).pow(3).sum()

    b = digits(codes, bits).to(DOUBLE)
    expected = bit_gradient(3 * (scale * codes - target).square(), scale, bits)
    for index in np.ndindex(4, bits):
        moved = torch.zeros_like(b)
        moved[index] = eps
        difference = (loss(b + moved) - loss(b - moved)) / (2 * eps)
        assert float(difference) == pytest.approx(float(expected[index]), rel=1e-6)
    assert bool((expected[:, 0] <= 0).all()) and bool((expected[:, 1:] >= 0).all())  # the sign's digit counts less


@pytest.mark.parametrize(("bits", "squares"), [(2, 5), (3, 21), (4, 85), (8, 21845)])
def test_norms_of_c(bits: int, squares: int) -> None:  # check 3
    c = bit_weights(bits)
    assert float(c.abs().sum()) == 2**bits - 1
    assert float(c.square().sum()) == squares
    assert bit_norm(bits) == pytest.approx(squares**0.5, rel=1e-15)


def test_controls_mirror_or_ignore_the_gradients() -> None:
    enbg = torch.tensor([1.0, 5.0, 3.0])
    generator = torch.Generator().manual_seed(1)
    assert importance(enbg, "sensitive", generator).tolist() == pytest.approx([1 / 9, 5 / 9, 3 / 9])
    assert importance(7 * enbg, "sensitive", generator).tolist() == pytest.approx([1 / 9, 5 / 9, 3 / 9])
    assert importance(enbg, "inverted", generator).tolist() == pytest.approx([5 / 9, 1 / 9, 3 / 9])
    assert importance(torch.zeros(2), "sensitive", generator).tolist() == [0, 0]
    drawn = [importance(enbg, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("rule", ["max", "meanabs"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_weight_quantizer_is_what_its_codes_say(rule: str, bits: int) -> None:
    torch.manual_seed(bits)
    w = torch.randn(6, 5, dtype=DOUBLE, requires_grad=True)
    quantizer = max_scale(bits, rule)
    codes = quantizer.codes(w.detach())
    assert torch.equal(quantizer.dequantize(codes), quantizer(w).detach())
    qmax = 2 ** (bits - 1) - 1
    magnitude = w.detach().abs().amax() / qmax if rule == "max" else 2 * w.detach().abs().mean() / qmax**0.5
    same(quantizer.scale, magnitude)
    assert int(codes.min()) >= -qmax - 1 and int(codes.max()) <= qmax
    (gradient,) = torch.autograd.grad(quantizer(w).sum(), w)
    clipped = torch.round(w.detach() / magnitude)
    inside = (clipped >= -qmax - 1) & (clipped <= qmax)
    torch.testing.assert_close(gradient, inside.to(DOUBLE))
    assert rule == "meanabs" or bool(inside.all())


def test_the_greatest_weight_always_has_a_gradient() -> None:
    quantizer = max_scale(3).float()
    for seed in range(50):
        w = torch.randn(7, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        (gradient,) = torch.autograd.grad(quantizer(w).sum(), w)
        torch.testing.assert_close(gradient, torch.ones(7))


def test_weights_of_zero_stay_zero() -> None:
    assert max_scale(4)(torch.zeros(3, dtype=DOUBLE)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        ("input", {}, "quantizer.input.name=.*use pact"),
        ("weight", {"signed": False}, "quantizer.weight.signed=false"),
        ("weight", {"options": {"rule": "mean"}}, "quantizer.weight.options.rule=mean: use max or meanabs"),
        ("weight", {"bits": 1}, "quantizer.weight.bits=1"),
    ],
)
def test_what_the_weight_quantizer_cannot_do_is_refused(role: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(QuantizerSpec(**{"name": NAME, "bits": 4, **settings}), (3,), None, role)
