"""DoReFa's weights with the maximum as a constant: the derivative of a weight is the same at every width."""

from __future__ import annotations

import torch
from torch import Tensor

from research.quant.quantizers.dorefa import TINY, DoReFa


class ConstantMaxDoReFa(DoReFa):
    """`DoReFa` whose weights have the derivative ``(1 - tanh(w)^2) / max|tanh w|``: no gradient through the maximum.

    A reading of SDQ's quantizer (inferred): public codes of DoReFa differ there. Inputs are DoReFa's.
    """

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.midrise:
            return super()._codes(x, scale)
        t = torch.tanh(x)
        t = t / torch.clamp(t.detach().abs().amax() + self.eps, min=TINY)
        return torch.where(self.bits == 1, x, t) / torch.where(self.bits > 0, scale, torch.inf)
