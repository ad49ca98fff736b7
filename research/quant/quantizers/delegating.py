"""A quantizer that stands for several others."""

from __future__ import annotations

import torch
from torch import Tensor

from research.quant.grid import Grid
from research.quant.quantizers.base import Quantizer


class Delegating(Quantizer):
    """Answers as ``present``, one of several quantizers, does; what training does with them is a subclass's matter."""

    @property
    def present(self) -> Quantizer:
        """The quantizer at work in evaluation."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """The present quantizer's grid."""
        return self.present.grid

    @property
    def scale(self) -> Tensor:
        """The present quantizer's scale."""
        return self.present.scale

    @property
    def zero_point(self) -> Tensor | None:
        """The present quantizer's zero point."""
        return self.present.zero_point

    def limits(self) -> tuple[Tensor, Tensor]:
        """The present quantizer's limits (its sign comes from calibration)."""
        return self.present.limits()

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """What the present quantizer makes of ``x``."""
        return self.present.fake_quantize(x, rounding)

    def transform(self, x: Tensor) -> Tensor:
        """The present quantizer's transform."""
        return self.present.transform(x)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """The present quantizer's codes."""
        return self.present.codes_ste(transformed)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values at the present width."""
        return self.present.dequantize(codes)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The present quantizer's integer codes."""
        return self.present.codes(x)
