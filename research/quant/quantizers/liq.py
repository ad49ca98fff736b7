"""LIQ: linear quantization between a trainable clip, on standardised weights (zhuang-group/SAQ).

The quantizer of the official code of SAQ (Liu, Cai, Zhuang, arXiv 2111.12273); formulas and constants from that code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.kernels import positive
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ranges import EPS
from research.quant.ste import round_ste

NORMALISE = ("auto", True, False)
RANGE_SHARE = 0.8


def standardise(w: Tensor) -> Tensor:
    """``(w - mean(w)) / std(w)`` over the whole tensor, unbiased std; both are constants to the gradient."""
    mean, std = w.detach().mean(), w.detach().std()
    return (w - mean) / torch.clamp(std, min=EPS)


def round_midrise(codes: Tensor, qmax: Tensor) -> Tensor:
    """The nearest of ``-qmax, -qmax + 2, ..., qmax`` for ``codes`` within the limits, straight-through derivative."""
    return 2 * round_ste((codes + qmax) / 2) - qmax


class LIQ(Quantizer):
    """Linear interpolation between the clips ``-c`` (inputs: 0) and ``c``, ``c = |raw_clip|`` trainable.

    With ``n = 2^b - 1``, weights: ``c (2 round(n (u + 1) / 2) / n - 1)``, ``u = clip(w~ / c, -1, 1)``, a mid-rise grid;
    inputs: ``c round(n clip(x / c, 0, 1)) / n``. Signed inputs are our extension: ``clip(x / c, -1, 1)`` with
    ``n = 2^(b-1) - 1`` on a grid with a zero. Derivatives: 1 inside the clips to ``x`` (by the standard deviation for
    standardised weights); to ``c`` the value less ``x``, over ``c``, inside, and +-1 outside. ``c`` has the optimizer's
    weight decay. ``spec.init`` plays no role.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        normalise: whether a weight is standardised first (`standardise`): the quantized weight then has a scale of its
            own, which a batch-norm behind the layer makes up for. ``auto``: convolutions yes, linear layers no.
        clip: initial ``c``; None: 1 for a standardised weight, 0.8 times the greatest magnitude for other data.
    """

    channelwise = False
    parameter_options = {"raw_clip": {}}

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        normalise: bool | str = "auto",
        clip: float | None = None,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        self.midrise = role == "weight"
        if self.midrise and (spec.narrow or spec.signed is False):
            raise ValueError("quantizer.weight: liq's mid-rise grid is symmetric, use signed=true, narrow=false")
        if normalise not in NORMALISE or (normalise is True and not self.midrise):
            raise ValueError(f"quantizer.{role}.options.normalise={normalise}: use auto, true (weights) or false")
        if clip is not None and clip <= 0:
            raise ValueError(f"quantizer.{role}.options.clip={clip}: use null or more than 0, such as 1")
        self.normalise = self.midrise and (len(self.shape) == 4 if normalise == "auto" else bool(normalise))
        self.initial_clip = clip
        self.raw_clip = nn.Parameter(torch.tensor(1.0 if clip is None else float(clip)))

    @property
    def clip(self) -> Tensor:
        """``c``, positive, 0-dim."""
        return positive(self.raw_clip)

    @property
    def scale(self) -> Tensor:
        """``c / n``: half the distance of neighbouring mid-rise values, since their codes are doubled."""
        return self.clip / torch.clamp(self.limits()[1], min=1)

    def transform(self, x: Tensor) -> Tensor:
        """``n u``: the standardised weight or the input in units of codes, clipped."""
        qmin, qmax = self.limits()
        return torch.clamp((standardise(x) if self.normalise else x) / self.scale, torch.maximum(qmin, -qmax), qmax)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes."""
        return round_midrise(transformed, self.limits()[1]) if self.midrise else round_ste(transformed)

    def dequantize(self, codes: Tensor) -> Tensor:
        """``codes * scale``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set ``c``: as given, or 1 for a standardised weight, or 0.8 times the greatest magnitude (1 if that is 0)."""
        self.settle_sign(x)
        if self.initial_clip is None and not self.normalise:
            greatest = RANGE_SHARE * self._work(x).abs().amax()
            self.raw_clip.copy_(torch.where(greatest > EPS, greatest, 1.0))
        else:
            self.raw_clip.fill_(1.0 if self.initial_clip is None else self.initial_clip)
        self.initialised.fill_(True)
