"""DoReFa-Net's quantizers (Zhou et al. 2016, arXiv 1606.06160; tensorpack, examples/DoReFa-Net)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.quant.clipping import clip_codes
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ste import straight_through

TINY = torch.finfo(torch.float32).tiny
WEIGHT_GRIDS = ("midrise", "uniform")


def normalised_tanh(w: Tensor, eps: float = 0.0) -> Tensor:
    """``tanh(w) / (max|tanh w| + eps)``, in [-1, 1]; the gradient flows through the maximum too (tensorpack)."""
    t = torch.tanh(w)
    return t / torch.clamp(t.abs().amax() + eps, min=TINY)


class DoReFa(Quantizer):
    """Weights on a fixed grid in [-1, 1], inputs clipped to [0, 1]; nothing is learned.

    Weights at ``k > 1`` bits: ``2 round((2^k - 1) (t / 2 + 1/2)) / (2^k - 1) - 1`` with ``t`` from `normalised_tanh`: a
    mid-rise grid (codes are odd, the scale is ``1 / (2^k - 1)``). At 1 bit: ``sign(w) * mean|w|``, derivative 1; there
    ``scale`` is the mean of the weights last given to ``codes`` or ``initialise``. Inputs:
    ``round(clip(x, 0, 1) * n) / n`` with ``n = 2^k - 1`` (signed inputs, as calibration finds them: [-1, 1],
    ``n = 2^(k-1) - 1``). Every derivative treats the quantized value as the clipped or normalised one. ``spec.init``
    plays no role.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        weight_grid: ``midrise``; or ``uniform``, the min-max grid of ``t`` with a level at zero, its range taken once
            from the initial weights (MQBench).
        eps: added to the maximum (MQBench: 1e-5).
    """

    channelwise = False
    magnitude: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        weight_grid: str = "midrise",
        eps: float = 0.0,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if weight_grid not in WEIGHT_GRIDS:
            raise ValueError(f"quantizer.weight.options.weight_grid={weight_grid!r}: use {' or '.join(WEIGHT_GRIDS)}")
        self.eps = eps
        self.midrise = role == "weight" and weight_grid == "midrise"
        if self.midrise and (spec.narrow or spec.signed is False):
            raise ValueError(
                f"quantizer.weight: {spec.name}'s mid-rise grid is signed and symmetric, use signed=true, narrow=false"
            )
        self.register_buffer("magnitude", torch.ones(()))

    def _scale(self, magnitude: Tensor) -> Tensor:
        """Scale with this mean or greatest magnitude of the weights."""
        qmin, qmax = self.limits()
        one = torch.ones_like(magnitude)
        if self.midrise:
            return torch.where(self.bits == 1, magnitude, one / torch.clamp(qmax, min=1))
        if self.role == "weight":
            return magnitude / torch.clamp((qmax - qmin) / 2, min=0.5)
        return one / torch.clamp(qmax, min=1)

    @property
    def scale(self) -> Tensor:
        """The step between neighbouring codes; for mid-rise codes half of it, since they are doubled."""
        return self._scale(self.magnitude)

    def scale_for(self, x: Tensor) -> Tensor:
        """``scale`` for ``x``, whatever was quantized last."""
        return self._scale(self._magnitude(x))

    def _magnitude(self, x: Tensor) -> Tensor:
        """What the scale depends on in ``x``: ``mean|w|`` of mid-rise weights, else the stored range."""
        return torch.clamp(x.detach().abs().mean(), min=TINY) if self.midrise else self.magnitude

    def clip(self, x: Tensor) -> Tensor:
        """An input's clipped value: in [0, 1], or [-1, 1] if signed."""
        return torch.clamp(x, -self.signed.to(x.dtype), torch.ones_like(self.magnitude))

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Codes before rounding, given the scale; without bits zero, whatever ``x`` is."""
        scale = torch.where(self.bits > 0, scale, torch.inf)
        if self.role != "weight":
            return self.clip(x) / scale
        t = normalised_tanh(x, self.eps)
        if self.midrise:
            return torch.where(self.bits == 1, x, t) / scale
        return clip_codes(t / scale, *self.limits(), mask="round_first")

    def transform(self, x: Tensor) -> Tensor:
        """The clipped input or normalised weight in units of codes."""
        return self._codes(x, self.scale_for(x))

    def _round(self, transformed: Tensor) -> Tensor:
        """Codes within the limits, without derivative."""
        qmin, qmax = self.limits()
        if self.midrise:
            codes = 2 * torch.round((transformed + qmax) / 2) - qmax
            sign = torch.where(transformed >= 0, qmax, qmin)
            return torch.where(self.bits == 1, sign, codes)
        return torch.clamp(torch.round(transformed), qmin, qmax)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes within the limits."""
        return straight_through(self._round(transformed), transformed)

    def dequantize(self, codes: Tensor) -> Tensor:
        """``codes * scale``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The quantized value, with the derivative of the value before rounding."""
        scale = self.scale_for(x)
        transformed = self._codes(x, scale)
        relaxed = transformed * scale
        return straight_through(self._round(transformed) * scale, relaxed) if rounding else relaxed

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` (int32, shape of ``x``); keeps ``mean|x|`` of mid-rise weights for ``scale``."""
        self.magnitude.copy_(self._magnitude(self._work(x)))
        return super().codes(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Find out the sign of an input; store the magnitude of a weight."""
        self.settle_sign(x)
        if self.role == "weight":
            t = normalised_tanh(x, self.eps)
            self.magnitude.copy_(self._magnitude(x) if self.midrise else torch.clamp(t.abs().amax(), min=TINY))
        self.initialised.fill_(True)
