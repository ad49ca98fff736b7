"""Binary weights in float32: filters of equal numbers, whose mean is not exact."""

import pytest
import torch

from research.quant.quantizers import QuantizerSpec, build_quantizer


@pytest.mark.parametrize(("count", "value"), [(27, 0.1), (576, 0.7), (9, 0.05), (4, 0.3)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_filter_of_equal_numbers_has_a_finite_scale_of_at_most_one(
    count: int, value: float, granularity: str
) -> None:
    w = torch.full((2, count), value, requires_grad=True)
    spec = QuantizerSpec("binary", 1, granularity=granularity)
    quantizer = build_quantizer(spec, w.shape, 0, "weight")
    quantizer.initialise(w)
    assert quantizer.scale.isfinite().all() and (quantizer.scale <= 1).all()
    out = quantizer(w)
    assert out.dtype == torch.float32 and out.isfinite().all() and (out.abs() <= 1).all()
    out.square().sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()
