"""Range initialisation."""

import pytest
import torch
from torch import Tensor

from research.quant.ranges import (
    METHODS,
    clipstd_range,
    initial_affine,
    initial_scale,
    minmax_range,
    percentile_range,
    power_of_two,
    quantization_error,
    refine_offset,
)

LIMITS = [(-2.0, 1.0), (-1.0, 1.0), (-8.0, 7.0), (0.0, 1.0), (0.0, 3.0), (0.0, 15.0)]


def limits(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low), torch.tensor(high)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channel_axis", [None, 0, 1, -1])
def test_shapes_and_positive_scales(method: str, channel_axis: int | None) -> None:
    x = torch.randn(3, 4, 5)
    x[1] = 0
    shape = () if channel_axis is None else tuple(n if a == channel_axis % 3 else 1 for a, n in enumerate(x.shape))
    for data in (x, torch.zeros(3, 4, 5)):
        scale = initial_scale(data, method, *limits(-2, 1), channel_axis)
        affine, zero_point = initial_affine(data, method, *limits(0, 3), channel_axis)
        for value in (scale, affine, zero_point):
            assert value.shape == shape
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.isfinite(affine).all() and (affine > 0).all()
        assert ((zero_point >= 0) & (zero_point <= 3) & (zero_point.frac() == 0)).all()


@pytest.mark.parametrize("channel_axis", [None, 0])
@pytest.mark.parametrize("method", METHODS)
def test_a_channel_is_a_tensor_of_its_own(method: str, channel_axis: int | None) -> None:
    x = torch.randn(3, 50, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [0.1]])
    whole = initial_scale(x, method, *limits(-8, 7), 0)
    for row, scale in zip(x, whole.flatten(), strict=True):
        torch.testing.assert_close(scale, initial_scale(row, method, *limits(-8, 7)))


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_mse_scale_is_the_best_of_a_dense_grid(low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator, dtype=torch.float64)
    x = x if low < 0 else x.relu()
    qmin, qmax = limits(low, high)
    zero = torch.zeros(())

    def error(scale: Tensor) -> float:
        return quantization_error(x, scale, zero, qmin, qmax).item()

    best = min(error(scale) for scale in torch.linspace(0.002, 1.5, 750) * x.abs().max())
    found = error(initial_scale(x, "mse", qmin, qmax))
    assert found <= best * 1.01
    assert found <= error(initial_scale(x, "minmax", qmin, qmax))


def test_percentile_drops_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([50.0])])
    low, high = percentile_range(x, 0.999)
    assert (low, high) == (-1, 1)
    assert percentile_range(x, 1.0)[1] == 50
    per_channel = percentile_range(torch.stack([x, 2 * x]), 0.999, channel_axis=0)
    assert per_channel[1].flatten().tolist() == [1, 2]


def test_clipstd_range() -> None:
    x = torch.cat([torch.zeros(99), torch.tensor([10.0])])
    low, high = clipstd_range(x, widen=False)
    assert high < 10
    torch.testing.assert_close(high - low, 2 * 2.6 * x.std())
    assert clipstd_range(x)[1] == 10 and clipstd_range(x)[0] == low


def test_lsq_scale_of_unsigned_and_signed_codes() -> None:
    x = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(initial_scale(x, "lsq", *limits(0, 16)), torch.tensor(1.0))
    torch.testing.assert_close(initial_scale(-x, "lsq", *limits(-2, 1)), torch.tensor(4.0))


def test_ranges_contain_zero() -> None:
    scale, zero_point = initial_affine(torch.tensor([2.0, 3.0]), "minmax", *limits(0, 15))
    assert zero_point == 0
    torch.testing.assert_close(scale, torch.tensor(0.2))
    scale, zero_point = initial_affine(torch.tensor([-3.0, -2.0]), "minmax", *limits(0, 15))
    assert zero_point == 15


def test_power_of_two() -> None:
    scale = torch.tensor([0.3, 1.0, 1.4, 1.5, 100.0])
    assert power_of_two(scale).tolist() == [0.25, 1.0, 1.0, 2.0, 128.0]


def test_refining_the_offset_never_raises_the_error() -> None:
    x = torch.rand(300, dtype=torch.float64) ** 2 + 0.5
    qmin, qmax = limits(0, 3)
    low, high = minmax_range(x)
    scale, offset = (high - low) / 3, low
    errors = []
    for steps in range(6):
        s, b = refine_offset(x, scale, offset, qmin, qmax, steps=steps)
        errors.append(quantization_error(x - b, s, torch.zeros(()), qmin, qmax).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_refining_constant_data_keeps_the_pair() -> None:
    scale, offset = refine_offset(torch.full((9,), 2.0), torch.tensor(0.5), torch.tensor(2.0), *limits(0, 3))
    assert (scale, offset) == (0.5, 2.0)


def test_unknown_method_is_named() -> None:
    for initial in (initial_scale, initial_affine):
        with pytest.raises(ValueError, match=r"quantizer\.\*\.init='best': use one of lsq, minmax, mse"):
            initial(torch.ones(3), "best", *limits(0, 3))
