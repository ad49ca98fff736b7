"""Constrained learning: the official functions' values and gradients, and the formulas by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from callbacks.constrained import MeanMagnitudeDoReFa
from callbacks.constrained.lagrangian import dual_ascent, output_distance, proximity, rounded_unit
from callbacks.constrained.networks import output_of
from research.quant.layers import QuantConv2d
from research.quant.passes import passes
from research.quant.quantizers import Mode, QuantizerSpec

Golden = dict[str, np.ndarray]
WIDTHS = (2, 4, 32)


@pytest.fixture
def vectors(golden: Callable[[str], Golden]) -> Golden:
    return golden("constrained")


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found.detach(), torch.from_numpy(np.asarray(expected)), rtol=1e-12, atol=1e-14)


def quantizer(role: str, bits: int, shape: tuple[int, ...] = ()) -> MeanMagnitudeDoReFa:
    spec = QuantizerSpec(name="callbacks.constrained.MeanMagnitudeDoReFa", bits=bits, signed=role == "weight")
    return MeanMagnitudeDoReFa(spec, shape, None, role).double()  # type: ignore[arg-type]


def layer(vectors: Golden, bits: int) -> QuantConv2d:
    """The quantized convolution; 32 bits are the quantizers' other mode, in which the block clips the input."""
    width = bits if bits < 32 else 8
    weight = torch.from_numpy(vectors["w"])
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], int(vectors["conv_stride"]), 1, bias=False)
    made = QuantConv2d(conv.double())
    made.weight = nn.Parameter(weight.clone())
    made.weight_quantizer = quantizer("weight", width, tuple(weight.shape))
    made.input_quantizer = quantizer("input", width)
    return made


def modes(bits: int) -> dict[str, Mode]:
    return {"weight": "relax", "input": "identity"} if bits == 32 else {"weight": "quantize", "input": "quantize"}


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_quantizers(vectors: Golden, bits: int) -> None:
    made = layer(vectors, bits)
    a = torch.tensor(vectors["a"], requires_grad=True)
    with passes(made, mode=modes(bits)):
        weight, inputs = made.quantized_weight(), made.input_quantizer(a)  # type: ignore[misc]
    close(weight, vectors[f"w_q_{bits}"])
    close(inputs, vectors[f"a_q_{bits}"])
    weight.backward(torch.from_numpy(vectors["w_gout"]))
    inputs.backward(torch.from_numpy(vectors["a_gout"]))
    assert made.weight.grad is not None and a.grad is not None
    close(made.weight.grad, vectors[f"w_grad_{bits}"])
    close(a.grad, vectors[f"a_grad_{bits}"])


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_convolution(vectors: Golden, bits: int) -> None:
    made = layer(vectors, bits)
    a = torch.tensor(vectors["a"], requires_grad=True)
    with passes(made, mode=modes(bits)):
        y = made(a)
    close(y, vectors[f"conv_out_{bits}"])
    y.backward(torch.from_numpy(vectors["conv_gout"]))
    assert made.weight.grad is not None and a.grad is not None
    close(made.weight.grad, vectors[f"conv_grad_w_{bits}"])
    close(a.grad, vectors[f"conv_grad_a_{bits}"])


def test_golden_proximity(vectors: Golden) -> None:
    for bits in map(int, vectors["bits"]):
        made = layer(vectors, bits)
        assert made.input_quantizer is not None
        z = made.input_quantizer(torch.from_numpy(vectors["a"]))
        close(z, vectors[f"prox_zq_{bits}"])
        low, high = made(torch.from_numpy(vectors["a"])), output_of(made, "", z, "relax", {})
        width = torch.tensor(float(bits), dtype=torch.float64)
        close(rounded_unit(low, width), vectors[f"prox_low_{bits}"])
        close(high.clamp(0, 1), vectors[f"prox_high_{bits}"])
        distance = proximity(high, low, width)
        close(distance, vectors[f"prox_mse_{bits}"])
        distance.backward()
        assert made.weight.grad is not None
        close(made.weight.grad, vectors[f"prox_grad_w_{bits}"])


def test_golden_output_distance(vectors: Golden) -> None:
    low, high = (torch.tensor(vectors[name], requires_grad=True) for name in ("logits_low", "logits_high"))
    distance = output_distance(low, high)
    close(distance, vectors["softce"])
    distance.backward()
    assert low.grad is not None and high.grad is not None
    close(low.grad, vectors["softce_grad_low"])
    close(high.grad, vectors["softce_grad_high"])


def test_golden_multipliers(vectors: Golden) -> None:
    duals = torch.from_numpy(vectors["dual_lambda"])
    for step, slacks in enumerate(torch.from_numpy(vectors["dual_slacks"])):
        close(dual_ascent(duals[step], slacks, float(vectors["dual_lr"])), vectors["dual_lambda"][step + 1])


def test_multipliers_grow_while_violated_shrink_while_slack_and_stop_at_zero() -> None:  # check 3
    duals = torch.tensor([0.5, 0.5, 0.01, 0.0])
    found = dual_ascent(duals, torch.tensor([0.2, -0.2, -0.2, -1.0]), 0.1)
    torch.testing.assert_close(found, torch.tensor([0.52, 0.48, 0.0, 0.0]))
    assert found[2] == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_those_of_a_mid_rise_grid_within_the_mean_magnitude(bits: int) -> None:  # check 6
    w = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = quantizer("weight", bits, tuple(w.shape))
    magnitude = w.abs().mean()
    made.mode = "relax"
    torch.testing.assert_close(made(w).abs().max(), magnitude)
    made.mode = "quantize"
    n = 2**bits - 1
    levels = magnitude * (2 * torch.arange(2**bits, dtype=torch.float64) / n - 1)
    torch.testing.assert_close(made(w).unique(), levels)
    assert (made(w) != 0).all()
    assert torch.equal(made.dequantize(made.codes(w)), made(w))


def test_the_absolute_distance_and_unclipped_outputs() -> None:
    high, low = torch.tensor([-1.0, 0.4, 3.0]), torch.tensor([0.0, 0.2, 2.0])
    torch.testing.assert_close(proximity(high, low, None), torch.tensor((1 + 0.04 + 1) / 3))
    torch.testing.assert_close(proximity(high, low, None, "absolute"), torch.tensor((1 + 0.2 + 1) / 3))
    torch.testing.assert_close(proximity(high, low, torch.tensor(1.0)), torch.tensor(0.16 / 3))


def test_dual_ascent_solves_a_convex_problem() -> None:  # check 7: min (a-3)^2 with (a-1)^2 <= 0.25
    dual, a = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for _ in range(400):
        a = (3 + dual) / (1 + dual)  # argmin of (a-3)^2 + dual (a-1)^2
        dual = dual_ascent(dual, (a - 1) ** 2 - 0.25, 0.5)
    assert float(a) == pytest.approx(1.5, abs=1e-6)
    assert float(dual) == pytest.approx(3.0, abs=1e-5)
