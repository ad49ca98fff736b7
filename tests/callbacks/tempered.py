"""A tempered quantizer in float64, for the tests of noise tempering."""

from typing import Any

import torch
from torch import Tensor

from callbacks.noise_tempering import TemperedLSQ
from callbacks.noise_tempering.quantizer import Tempering
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.base import Role
from research.quant.quantizers.lsq import LSQ

TARGET = "callbacks.noise_tempering.NoiseTempering"


def tempered(
    values: Tensor, bits: int = 3, scale: float = 0.2, strength: float = 1.0, role: Role = "weight", **switches: Any
) -> TemperedLSQ:
    """A float64 quantizer of signed codes in training with the given step."""
    source = LSQ(QuantizerSpec(bits=bits, signed=True), values.shape, None, role)
    quantizer = TemperedLSQ(source, Tempering(**switches)).double()
    with torch.no_grad():
        quantizer.raw_scale.fill_(scale)
        quantizer.delta.fill_(quantizer.tempering.delta)
    quantizer.strength.fill_(strength)
    return quantizer


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-10, atol=1e-12)
