"""LSQ+: learned step and offset (Bhalgat, Lee, Nagel, Blankevoort, Kwak, CVPR Workshops 2020, arXiv 2004.09576).

No official code was published; that the offset's gradient is scaled like the step's follows ZouJiu1/LSQplus.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.clipping import clip_codes
from research.quant.quantizers.base import QuantizerSpec, Role
from research.quant.quantizers.lsq import LSQ
from research.quant.ranges import initial_affine, initial_scale, refine_offset
from research.quant.ste import round_ste, straight_through

CONFIGURATIONS = {"C1": (False, False), "C2": (True, False), "C3": (True, True), "C4": (False, True)}
"""(signed codes, offset) of the paper's four parametrisations; C1 is LSQ."""
OFFSETS = ("real", "integer")


class LSQPlus(LSQ):
    """``x_hat = s * round(clip((x - beta) / s, qmin, qmax)) + beta`` with trainable ``s`` and ``beta``.

    Derivatives: to ``x`` and ``s`` as in LSQ with ``x - beta`` for ``x``; to ``beta`` 0 inside and 1 outside. Both
    parameters' gradients are multiplied by LSQ's factor and neither is decayed. In terms of the codes,
    ``x_hat = (q - zero_point) * s`` with ``zero_point = -beta / s``, a real number: an integer runtime quantizes
    ``x - beta`` and adds ``beta`` behind. Weights have no offset by default (an offset costs a data-dependent term at
    inference); ``init: three_sigma`` is the paper's for them, ``mse`` for inputs.

    Args:
        spec, shape, channel_axis, role: as every quantizer's; the configuration says whether codes are signed.
        configuration: C1 unsigned, C2 signed, C3 signed with offset, C4 unsigned with offset; C2 for weights and C4 for
            inputs if not given.
        offset: ``real`` as above; ``integer`` learns the zero point itself and rounds it (MQBench's asymmetric LSQ).
        count_batch, gradient_factor, mask: as LSQ's.
    """

    parameter_options = {"raw_scale": {"weight_decay": 0.0}, "raw_offset": {"weight_decay": 0.0}}

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        configuration: str | None = None,
        offset: str = "real",
        count_batch: bool = True,
        gradient_factor: bool = True,
        mask: str = "clip_first",
    ) -> None:
        super().__init__(spec, shape, channel_axis, role, count_batch, gradient_factor, mask)
        configuration = configuration or ("C2" if role == "weight" else "C4")
        if configuration not in CONFIGURATIONS:
            raise ValueError(
                f"quantizer.{role}.options.configuration={configuration!r}: use one of {', '.join(CONFIGURATIONS)}"
            )
        if offset not in OFFSETS:
            raise ValueError(f"quantizer.{role}.options.offset={offset!r}: use {' or '.join(OFFSETS)}")
        signed, has_offset = CONFIGURATIONS[configuration]
        if spec.signed not in ("auto", signed):
            raise ValueError(
                f"quantizer.{role}.signed={spec.signed}: configuration {configuration} says {signed}, use auto"
            )
        self.signed.fill_(signed)
        self.integer_offset = offset == "integer"
        self.raw_offset = nn.Parameter(torch.zeros(self.state_shape)) if has_offset else None

    @property
    def zero_point(self) -> Tensor | None:
        """Code of the value zero: ``-beta / s``, real (``offset: integer``: within the limits), or None."""
        return None if self.raw_offset is None else self._zero_point(self.raw_offset, self.scale)

    def _zero_point(self, offset: Tensor, scale: Tensor) -> Tensor:
        if not self.integer_offset:
            return torch.where(self.bits > 0, -offset / scale, 0.0)
        return straight_through(torch.clamp(torch.round(offset), *self.limits()), offset)

    def _clip(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        qmin, qmax = self.limits()
        if self.integer_offset:
            return clip_codes(x / scale, qmin - zero_point, qmax - zero_point, self.mask)
        return clip_codes(x / scale + zero_point, qmin, qmax, self.mask)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize ``x`` with one scale and one offset tensor, their gradients scaled."""
        if self.raw_offset is None:
            return super().fake_quantize(x, rounding)
        scale = self._with_factor(self.scale, x)
        zero_point = self._zero_point(self._with_factor(self.raw_offset, x), scale)
        transformed = self._clip(x, scale, zero_point)
        codes = round_ste(transformed) if rounding else transformed
        return (codes if self.integer_offset else codes - zero_point) * scale

    def transform(self, x: Tensor) -> Tensor:
        """``clip(x / s - beta / s, qmin, qmax)``; with an integer zero point ``clip(x / s, qmin - z, qmax - z)``."""
        zero_point = self.zero_point
        return super().transform(x) if zero_point is None else self._clip(x, self.scale, zero_point)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes, an integer zero point added."""
        codes = super().codes_ste(transformed)
        zero_point = self.zero_point
        return codes if zero_point is None or not self.integer_offset else codes + zero_point

    def dequantize(self, codes: Tensor) -> Tensor:
        """``(codes - zero_point) * s``."""
        zero_point = self.zero_point
        if zero_point is None:
            return super().dequantize(codes)
        scale = self.scale
        return (codes.to(scale.dtype) - zero_point) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set step and offset from data by ``spec.init``; ``mse`` minimises ``||x_hat - x||^2`` over both."""
        qmin, qmax = self.limits()
        if self.raw_offset is None:
            self.raw_scale.copy_(initial_scale(x, self.spec.init, qmin, qmax, self.channel_axis))
        else:
            scale, zero_point = initial_affine(x, self.spec.init, qmin, qmax, self.channel_axis)
            offset = zero_point if self.integer_offset else -zero_point * scale
            if self.spec.init == "mse" and not self.integer_offset:
                scale, offset = refine_offset(self._work(x), scale, offset, qmin, qmax, self.channel_axis)
            self.raw_scale.copy_(scale)
            self.raw_offset.copy_(offset)
        self.initialised.fill_(True)
