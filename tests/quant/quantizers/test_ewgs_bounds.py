import pytest
import torch
from torch import Tensor

from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.ewgs import EWGS, starting_bounds


def make(role: str, bits: int, **options: str) -> EWGS:
    axis = 0 if role == "weight" else None
    quantizer = build_quantizer(QuantizerSpec(name="ewgs", bits=bits, options=options), (50,), axis, role)  # type: ignore[arg-type]
    assert isinstance(quantizer, EWGS)
    return quantizer


def error(quantizer: EWGS, x: Tensor) -> float:
    """Of the best affine image of the quantized values, which is what the layer's output scale makes of them."""
    values = quantizer(x).detach()
    fit = torch.linalg.lstsq(torch.stack([values, torch.ones_like(values)], 1), x[:, None]).solution
    return float((torch.stack([values, torch.ones_like(values)], 1) @ fit - x[:, None]).square().mean())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_mse_bounds_have_the_smaller_error(role: str, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5000) if role == "weight" else torch.randn(5000).relu()
    errors = []
    for bounds in ("std", "mse"):
        quantizer = make(role, bits, bounds=bounds)
        quantizer.initialise(x)
        errors.append(error(quantizer, x))
    assert errors[1] < (0.8 if bits == 2 else 1) * errors[0]


def test_mse_bounds_of_values_on_a_grid_are_its_ends() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    lower, upper = starting_bounds(x, torch.tensor(3.0), True, "mse")
    torch.testing.assert_close((lower, upper), (torch.tensor(-1.5), torch.tensor(1.5)))
    lower, upper = starting_bounds(x - 2, torch.tensor(3.0), False, "mse")
    torch.testing.assert_close((lower, upper), (torch.tensor(-3.5), torch.tensor(-0.5)))


def test_constant_data_give_usable_bounds() -> None:
    for bounds in ("std", "mse"):
        quantizer = make("input", 2, bounds=bounds)
        quantizer.initialise(torch.zeros(50))
        assert float(quantizer.upper) > float(quantizer.lower)
        assert bool(quantizer(torch.zeros(50)).isfinite().all())


def test_other_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer.weight.options.bounds=minmax: use std or mse"):
        make("weight", 4, bounds="minmax")
