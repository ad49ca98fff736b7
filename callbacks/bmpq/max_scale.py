"""BMPQ's weight quantizer: a symmetric grid whose scale follows from the weights anew in every forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from research.quant.clipping import clip_codes
from research.quant.quantizers import Quantizer, QuantizerSpec, Role

TINY = torch.finfo(torch.float32).tiny
Rule = Literal["max", "meanabs"]
RULES: tuple[Rule, ...] = get_args(Rule)


class MaxScale(Quantizer):
    """``w_q = s clip(round(w / s))`` with ``s = max|w| / (2^(q-1) - 1)``, which no gradient flows through.

    Nothing is clipped, and the derivative is 1. ``meanabs`` takes ``s = 2 mean|w| / sqrt(2^(q-1) - 1)``, LSQ's start,
    for few bits: with the maximum most weights are 0 at 2 bits. Values that it clips have derivative 0. ``spec.init``
    plays no role. `scale` is that of the weights last given to ``codes`` or ``initialise``.

    Args:
        spec, shape, channel_axis, role: as every quantizer's; for weights alone.
        rule: ``max`` or ``meanabs``.
    """

    channelwise = False
    min_bits = {"weight": 2, "input": 2, "output": 2}
    magnitude: Tensor

    def __init__(
        self, spec: QuantizerSpec, shape: Sequence[int], channel_axis: int | None, role: Role, rule: Rule = "max"
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if role != "weight":
            raise ValueError(f"quantizer.{role}.name={spec.name}: it quantizes weights; use pact for an {role}")
        if rule not in RULES:
            raise ValueError(f"quantizer.weight.options.rule={rule}: use {' or '.join(RULES)}")
        self.rule = rule
        self.register_buffer("magnitude", torch.ones(()))

    def scale_of(self, w: Tensor) -> Tensor:
        """``s`` of these weights at the present width, 0-dim, no gradient."""
        return self._scale(self._magnitude(w))

    @property
    def scale(self) -> Tensor:
        """`scale_of` the weights last given to ``codes`` or ``initialise``."""
        return self._scale(self.magnitude)

    def _magnitude(self, w: Tensor) -> Tensor:
        w = w.detach().abs()
        return torch.clamp(w.amax() if self.rule == "max" else w.mean(), min=TINY)

    def _scale(self, magnitude: Tensor) -> Tensor:
        qmax = torch.clamp(self.limits()[1].to(magnitude.dtype), min=1)
        return magnitude / qmax if self.rule == "max" else 2 * magnitude / qmax.sqrt()

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        # the greatest weight may come out of the division above qmax: it is inside all the same
        return clip_codes(x / scale, *self.limits(), mask="round_first")

    def transform(self, x: Tensor) -> Tensor:
        """``w / s``, clipped, in units of codes."""
        return self._codes(x, self.scale_of(x))

    def dequantize(self, codes: Tensor) -> Tensor:
        """``s * codes``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize ``x`` with its own scale."""
        scale = self.scale_of(x)
        transformed = self._codes(x, scale)
        return (self.codes_ste(transformed) if rounding else transformed) * scale

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` (int32); keeps the magnitude of ``x`` for `scale`."""
        self.initialise(x)
        return super().codes(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Keep the magnitude of ``x`` for `scale`."""
        self.magnitude.copy_(self._magnitude(self._work(x)))
        self.initialised.fill_(True)
