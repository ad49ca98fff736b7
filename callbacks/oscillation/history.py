"""The running state of one layer's codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from research.quant.oscillation import Oscillation, track


class CodeHistory(nn.Module):
    """State of `research.quant.oscillation.Oscillation` as buffers that are written in place.

    Args:
        weight: the latent weight, for its shape.
        bits: the width at which the codes are taken.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    oscillations: Tensor
    bits: Tensor

    def __init__(self, weight: Tensor, bits: Tensor) -> None:
        super().__init__()
        for name, dtype in zip(Oscillation._fields, (torch.int16, torch.int8, torch.float32, torch.int32), strict=True):
            self.register_buffer(name, torch.zeros(weight.shape, dtype=dtype))
        self.register_buffer("bits", bits.detach().clone())

    def begin(self, codes: Tensor) -> None:
        """Take ``codes`` as those at the start of the run."""
        self.codes.copy_(codes)

    def look(self, codes: Tensor, bits: Tensor, momentum: float) -> None:
        """Track ``codes`` (shape of the weight) after a further step; at another width everything starts anew."""
        same = (bits == self.bits).all()
        before = Oscillation(
            codes=torch.where(same, self.codes.to(codes.dtype), codes),
            direction=self.direction * same,
            frequency=self.frequency * same,
            oscillations=self.oscillations * same,
        )
        for name, value in track(before, codes, momentum)._asdict().items():
            getattr(self, name).copy_(value)
        self.bits.copy_(bits)
