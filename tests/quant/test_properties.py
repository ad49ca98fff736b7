"""Properties of LSQ and MinMax for arbitrary data, widths and signs."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.base import Quantizer
from research.quant.ranges import METHODS

VALUES = arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False))
NAMES = st.sampled_from([("lsq", {}), ("minmax", {}), ("minmax", {"symmetric": False})])
few = settings(max_examples=40, deadline=None)


def calibrated(name: tuple[str, dict[str, bool]], bits: int, signed: bool, init: str, x: Tensor) -> Quantizer:
    spec = QuantizerSpec(name[0], bits, signed=signed, init=init, options=dict(name[1]))
    quantizer = build_quantizer(spec, (), None, "input").double()
    quantizer.initialise(x)
    return quantizer


@few
@given(VALUES, NAMES, st.integers(1, 8), st.booleans(), st.sampled_from(METHODS))
def test_grid_error_and_order(values: np.ndarray, name: tuple, bits: int, signed: bool, init: str) -> None:
    x = torch.from_numpy(values).sort().values
    quantizer = calibrated(name, bits, signed, init, x)
    out, codes = quantizer(x), quantizer.codes(x)
    qmin, qmax = quantizer.limits()
    assert torch.equal(out, quantizer.dequantize(codes)) and torch.equal(quantizer(out), out)
    assert ((codes >= qmin) & (codes <= qmax)).all()
    assert (out.diff() >= 0).all()
    low, high = quantizer.dequantize(qmin), quantizer.dequantize(qmax)
    inside = (x >= low) & (x <= high)
    assert ((out - x).abs()[inside] <= quantizer.scale / 2 * (1 + 1e-9)).all()
    assert (out[x > high] == high).all() and (out[x < low] == low).all()


@few
@given(VALUES, NAMES, st.integers(2, 8), st.integers(-6, 6), st.sampled_from(METHODS))
def test_power_of_two_equivariance(values: np.ndarray, name: tuple, bits: int, exponent: int, init: str) -> None:
    x = torch.from_numpy(values)
    if x.abs().max() * 2.0**exponent < 1e-2:  # the least positive scale is absolute
        x = x + 1.0
    one, other = (calibrated(name, bits, True, init, data) for data in (x, x * 2.0**exponent))
    assert torch.equal(one.codes(x), other.codes(x * 2.0**exponent))
    torch.testing.assert_close(other(x * 2.0**exponent), one(x) * 2.0**exponent, rtol=1e-9, atol=1e-12)
