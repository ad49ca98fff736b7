"""The weight quantizer of the official code: DoReFa's, scaled by the mean magnitude of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.quant.quantizers.base import QuantizerSpec, Role
from research.quant.quantizers.dorefa import DoReFa, normalised_tanh


class MeanMagnitudeDoReFa(DoReFa):
    """Weights ``E (2 R(t) - 1)``, ``t = tanh(w) / (2 max|tanh w|) + 1/2``, ``R(t) = round(n t) / n``, ``n = 2^b - 1``.

    ``E = mean|w|`` has no gradient, the maximum has. In mode ``relax`` the weight is ``E tanh(w) / max|tanh w|``: the
    two differ by rounding alone. At 1 bit the levels are ``-E`` and ``E``. Inputs are DoReFa's.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
    """

    def __init__(self, spec: QuantizerSpec, shape: Sequence[int], channel_axis: int | None, role: Role) -> None:
        super().__init__(spec, shape, channel_axis, role)

    def _scale(self, magnitude: Tensor) -> Tensor:
        if self.role != "weight":
            return super()._scale(magnitude)
        return magnitude / torch.clamp(self.limits()[1], min=1)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        return normalised_tanh(x) * self.limits()[1] if self.role == "weight" else super()._codes(x, scale)

    def _round(self, transformed: Tensor) -> Tensor:
        if self.role != "weight":
            return super()._round(transformed)
        qmax = self.limits()[1]
        return 2 * torch.round((transformed + qmax) / 2) - qmax
