"""PACT: parameterized clipping activation (Choi et al. 2018, arXiv 1805.06085)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.quantizers.base import QuantizerSpec, Role
from research.quant.quantizers.dorefa import DoReFa
from research.quant.ranges import EPS


def pact_clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` clipped to ``[low, high]``; the bounds themselves, and all gradient on them, belong to the clips.

    ``dy/dx = 1`` for ``low < x < high``; ``dy/dhigh = 1`` where ``x >= high``; ``dy/dlow = 1`` where ``x <= low``.
    """
    return torch.where(x >= high, high, torch.where(x <= low, low, x))


class PACT(DoReFa):
    """Inputs clipped to ``[0, alpha]`` with a trainable ``alpha``; weights as DoReFa's.

    ``y_q = round(y n / alpha) alpha / n``, ``y = pact_clip(x, 0, alpha)``, ``n = 2^k - 1``, and ``dy_q = dy``: only
    clipped values move ``alpha``. The paper adds ``lambda alpha^2`` to the loss: ``alpha`` has the optimizer's weight
    decay. Inputs with negative values are clipped to ``[-alpha, alpha]``, or, with ``lower``, to ``[beta, alpha]`` with
    a trainable ``beta`` and a zero point (MQBench). ``spec.init`` plays no role: ``alpha`` starts at a constant.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        alpha: initial upper clip (MQBench: 6).
        lower: initial lower clip ``beta``, below zero; None for a grid without zero point.
        weight_grid, eps: DoReFa's, for weights.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        alpha: float = 10.0,
        lower: float | None = None,
        weight_grid: str = "midrise",
        eps: float = 0.0,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role, weight_grid, eps)
        if alpha <= 0 or (lower is not None and lower >= 0):
            raise ValueError(f"quantizer.{role}.options: alpha={alpha}, lower={lower}: use lower < 0 < alpha")
        clips = role != "weight"
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if clips else None
        self.beta = nn.Parameter(torch.tensor(float(lower))) if clips and lower is not None else None
        if self.beta is not None:
            self.signed.fill_(bool(spec.signed is True))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        assert self.alpha is not None
        high = torch.clamp(self.alpha, min=EPS)
        if self.beta is not None:
            return torch.clamp(self.beta, max=0), high
        return torch.where(self.signed, -high, torch.zeros_like(high)), high

    def _scale(self, magnitude: Tensor) -> Tensor:
        if self.alpha is None:
            return super()._scale(magnitude)
        low, high = self._bounds()
        qmin, qmax = self.limits()
        if self.beta is None:
            return high / torch.clamp(qmax, min=1)
        return (high - low) / torch.clamp(qmax - qmin, min=1)

    @property
    def zero_point(self) -> Tensor | None:
        """Code of the value zero with ``lower``: an integer, without gradient; else None."""
        if self.beta is None:
            return None
        qmin, qmax = self.limits()
        return torch.clamp(qmin - torch.round(self._bounds()[0] / self.scale), qmin, qmax).detach()

    def clip(self, x: Tensor) -> Tensor:
        """`pact_clip` of an input."""
        return pact_clip(x, *self._bounds())

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.beta is None:
            return super()._codes(x, scale)
        # a product, as in PyTorch's operators: both bounds lie near ties
        return self.clip(x) * torch.where(self.bits > 0, 1 / scale, 0.0)

    def _round(self, transformed: Tensor) -> Tensor:
        zero_point = self.zero_point
        if zero_point is None:
            return super()._round(transformed)
        qmin, qmax = self.limits()
        return torch.clamp(torch.round(transformed), qmin - zero_point, qmax - zero_point)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes within the limits, the zero point added."""
        codes = super().codes_ste(transformed)
        return codes if self.zero_point is None else codes + self.zero_point

    def dequantize(self, codes: Tensor) -> Tensor:
        """``(codes - zero_point) * scale``."""
        return super().dequantize(codes if self.zero_point is None else codes - self.zero_point)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Find out the sign of an input without ``lower``; store the magnitude of a weight."""
        if self.beta is None:
            super().initialise(x)
        self.initialised.fill_(True)
