"""N2UQ: learned input thresholds, equidistant output levels (Liu, Cheng, Huang, Xing, Shen, CVPR 2022).

"Nonuniform-to-Uniform Quantization", arXiv 2111.14826. Formulas and constants from the official code
(liuzechun/Nonuniform-to-Uniform-Quantization).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.gste import fused_gste, gste_ramp, segments, stretched
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.quantizers.liq import round_midrise
from research.quant.ranges import initial_scale, reduced_axes
from research.quant.ste import straight_through

RANGE = 2.0
TINY = 1e-12
GRAD_MODES = ("official", "plain")


def mean_magnitude(w: Tensor, channel_axis: int | None = None) -> Tensor:
    """``mean|w|``, per tensor (0-dim) or channel (axes kept), without gradient; at least 1e-12."""
    mean = w.detach().abs().mean(reduced_axes(w, channel_axis), keepdim=channel_axis is not None)
    return torch.clamp(mean, min=TINY)


class N2UQ(Quantizer):
    """Inputs by learned thresholds (LTQ), weights on an entropy-preserving scale.

    Inputs, with ``L = 2^n - 1`` and ``u = scale1 x``: codes ``#{i: u > T_i}``, values ``scale2 (2 / L) codes``; the
    derivative is that of ``scale2 (2 / L)`` times `gste_ramp`. ``start``, ``a`` (L,), ``scale1`` and ``scale2`` are
    trained and not decayed; L is that of the width at construction. At another width the ramp is what stays: the
    thresholds are where it reaches halfway between the fewer or more codes (our extension). Codes are unsigned.

    Weights, per tensor or channel: ``V = w / s``, ``s = mean|w| (2^n - 1) / 2^(n-1)`` without gradient, and
    ``s (2 round((clip(V, -1, 1) + 1) (2^n - 1) / 2) / (2^n - 1) - 1)``, a mid-rise grid. Nothing is clipped in
    backward. ``scale`` follows from the weights last given to ``codes`` or ``initialise``.

    Args:
        spec, shape, channel_axis, role: as every quantizer's. ``spec.init`` sets the range of inputs.
        calibrate: ``scale1`` and ``scale2`` of an input start from data; off, at 1, as in the official code.
        grad_mode: derivative of a weight's value: ``official``, ``1 / s`` (a matter of the learning rate unless the
            optimizer is invariant to scale, as Adam is), or ``plain``, 1.
    """

    parameter_options = {name: {"weight_decay": 0.0} for name in ("start", "a", "scale1", "scale2")}
    start: Tensor | None
    a: Tensor | None
    scale1: Tensor | None
    scale2: Tensor | None
    magnitude: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        calibrate: bool = True,
        grad_mode: str = "official",
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        self.midrise = role == "weight"
        if spec.signed not in ("auto", self.midrise) or spec.narrow:
            raise ValueError(
                f"quantizer.{role}: n2uq has mid-rise weights and unsigned inputs, use signed=auto, narrow=false"
            )
        if grad_mode not in GRAD_MODES:
            raise ValueError(f"quantizer.{role}.options.grad_mode={grad_mode!r}: use {' or '.join(GRAD_MODES)}")
        self.calibrate = calibrate
        self.grad_mode = grad_mode
        count = max(1, 2**spec.bits - 1)
        learned = {"start": torch.zeros(()), "a": torch.full((count,), RANGE / count)}
        learned |= {"scale1": torch.ones(()), "scale2": torch.ones(())}
        for name, value in learned.items():
            self.register_parameter(name, None if self.midrise else nn.Parameter(value))
        self.register_buffer("magnitude", torch.ones(self.state_shape))

    @property
    def scale(self) -> Tensor:
        """Weights: ``s / (2^n - 1)``, half the distance of neighbouring values; inputs: ``scale2 * 2 / L``."""
        if self.scale2 is None:
            return self._weight_scale(self.magnitude)
        return self.scale2 * RANGE / torch.clamp(self.limits()[1], min=1)

    def _weight_scale(self, magnitude: Tensor) -> Tensor:
        return magnitude * torch.exp2(1 - self.bits)

    @property
    def thresholds(self) -> Tensor:
        """``T_i`` (L,) of an input at the width of its construction: they are compared with ``scale1 * x``."""
        assert self.start is not None and self.a is not None
        borders, lengths = segments(self.start, self.a)
        return borders[:-1] + lengths / 2

    def _stretch(self) -> Tensor:
        """Codes of the present width for one of the width at construction (0-dim); exactly 1 at the latter."""
        assert self.a is not None
        return self.limits()[1].to(self.a.dtype) / len(self.a)

    def _ltq(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ramp and codes of an input at the present width."""
        assert self.start is not None and self.a is not None and self.scale1 is not None
        ramp, count = gste_ramp(self.scale1 * x, *segments(self.start, self.a))
        return stretched(ramp, count, self._stretch())

    def transform(self, x: Tensor) -> Tensor:
        """The ramp of an input, or a weight clipped, in units of codes."""
        if not self.midrise:
            return self._ltq(x)[0]
        return torch.clamp(x / self._weight_scale(mean_magnitude(x, self.channel_axis)), *self.limits())

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes; an input exactly at a threshold takes the lower one."""
        if self.midrise:
            return round_midrise(transformed, self.limits()[1])
        return straight_through(torch.ceil(transformed - 0.5), transformed)

    def dequantize(self, codes: Tensor) -> Tensor:
        """``codes * scale``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The quantized value: an input's with G-STE, a weight's with the derivative that ``grad_mode`` says."""
        if self.start is not None and self.a is not None and self.scale1 is not None:
            if rounding and self.kernels not in (None, "affine"):
                borders, lengths = segments(self.start, self.a)
                return fused_gste(x, self.scale1, self.scale, borders, lengths, self._stretch())
            ramp, codes = self._ltq(x)
            return self.dequantize(straight_through(codes, ramp) if rounding else ramp)
        scale = self._weight_scale(mean_magnitude(x, self.channel_axis))
        transformed = torch.clamp((x / scale).detach(), *self.limits())
        codes = self.codes_ste(transformed) if rounding else transformed
        reach = scale * torch.clamp(self.limits()[1], min=1)
        return straight_through(codes * scale, x / reach if self.grad_mode == "official" else x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` (int32, shape of ``x``); keeps the mean magnitude of a weight for ``scale``."""
        x = self._work(x)
        if not self.midrise:
            return self._ltq(x)[1].to(torch.int32)
        self.magnitude.copy_(mean_magnitude(x, self.channel_axis))
        return super().codes(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Store the magnitude of a weight; with ``calibrate`` stretch an input's range 0..2 over its data."""
        if self.scale1 is None or self.scale2 is None:
            self.magnitude.copy_(mean_magnitude(self._work(x), self.channel_axis))
        elif self.calibrate:
            step = RANGE / torch.clamp(self.limits()[1], min=1).to(self.scale1.dtype)
            scale = initial_scale(x, self.spec.init, *self.limits())
            self.scale1.copy_(step / scale)
            self.scale2.copy_(scale / step)
        self.initialised.fill_(True)
