"""MinMax: a uniform quantizer with a fixed range (Jacob et al. 2018, arXiv 1712.05877; MQBench's FixedFakeQuantize)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.quant.clipping import check_mask, clip_codes
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ranges import affine_from_range, initial_affine, initial_scale, power_of_two
from research.quant.ste import round_ste


class MinMax(Quantizer):
    """``x_hat = (clip(round(x / s) + z, qmin, qmax) - z) * s`` with a range set by calibration and never trained.

    The state is the range ``[low, high]``, from which scale and zero point follow at any width (`affine_from_range`).

    Args:
        spec, shape, channel_axis, role: as every quantizer's; asymmetric codes are unsigned unless ``signed`` is given.
        symmetric: no zero point.
        power_of_two: round the scale to the nearest power of two.
        mask: where the gradient counts a value as inside, see `clip_codes`.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        symmetric: bool = True,
        power_of_two: bool = False,
        mask: str = "clip_first",
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        self.symmetric = symmetric
        self.power_of_two = power_of_two
        self.mask = check_mask(mask)
        if not symmetric and spec.signed == "auto":
            self.signed.fill_(False)
        self.register_buffer("low", torch.zeros(self.state_shape))
        self.register_buffer("high", torch.ones(self.state_shape))

    def _affine(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = affine_from_range(self.low, self.high, *self.limits(), symmetric=self.symmetric)
        if not self.power_of_two:
            return scale, zero_point
        scale = power_of_two(scale)
        qmin, qmax = self.limits()
        return scale, zero_point if self.symmetric else torch.clamp(qmin - torch.round(self.low / scale), qmin, qmax)

    @property
    def scale(self) -> Tensor:
        """Step of the range at the present width, shape ``state_shape``; no gradient."""
        return self._affine()[0]

    @property
    def zero_point(self) -> Tensor | None:
        """Code of the value zero, an integer within the limits; None if symmetric."""
        return None if self.symmetric else self._affine()[1]

    def transform(self, x: Tensor) -> Tensor:
        """``clip(x / s, qmin - z, qmax - z)``."""
        return self._clip(x, *self._affine())

    def _clip(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        qmin, qmax = self.limits()
        return clip_codes(x / scale, qmin - zero_point, qmax - zero_point, self.mask)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes, the zero point added."""
        return round_ste(transformed) + self._affine()[1]

    def dequantize(self, codes: Tensor) -> Tensor:
        """``(codes - z) * s``."""
        scale, zero_point = self._affine()
        return (codes.to(scale.dtype) - zero_point) * scale

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize ``x``; the zero point cancels."""
        scale, zero_point = self._affine()
        transformed = self._clip(x, scale, zero_point)
        return (round_ste(transformed) if rounding else transformed) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the range from data by ``spec.init``: the range whose scale (and zero point) that method gives."""
        qmin, qmax = self.limits()
        if self.symmetric:
            self.settle_sign(x)
            qmin, qmax = self.limits()
            scale = initial_scale(x, self.spec.init, qmin, qmax, self.channel_axis)
            half = (qmax - qmin) / 2
            self.low.copy_(torch.where(qmin < 0, -half * scale, 0.0))
            self.high.copy_(torch.where(qmin < 0, half, qmax) * scale)
        else:
            scale, zero_point = initial_affine(x, self.spec.init, qmin, qmax, self.channel_axis)
            self.low.copy_((qmin - zero_point) * scale)
            self.high.copy_((qmax - zero_point) * scale)
        self.initialised.fill_(True)
