"""Binary quantization: IR-Net's Libra-PB and error decay estimator, and XNOR-Net's scaled sign for comparison.

IR-Net: Qin et al., CVPR 2020, arXiv 1909.10788, htqin/IR-Net. XNOR-Net: Rastegari et al., ECCV 2016, arXiv 1603.05279.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from research.quant.grid import Grid
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ranges import power_of_two, reduced_axes
from research.quant.ste import straight_through

FORMS = ("libra", "xnor")
TINY, SMALL = 1e-12, 1e-6
DECAY = 0.9


def standardised(w: Tensor, channel_axis: int | None = None) -> Tensor:
    """``(w - mean) / std``, unbiased std, per tensor or channel; differentiable in mean and std (IR-Net's code).

    The std is at least 1e-6 of the greatest magnitude, and 1e-12: our guard of constant filters, whose differences from
    their mean are rounding errors.
    """
    axes, keep = reduced_axes(w, channel_axis), channel_axis is not None
    balanced = w - w.mean(dim=axes, keepdim=keep)
    floor = SMALL * w.detach().abs().amax(dim=axes, keepdim=keep) + TINY
    return balanced / torch.sqrt(torch.maximum(balanced.var(dim=axes, keepdim=keep), floor.square()))


def mean_magnitude(w: Tensor, channel_axis: int | None = None) -> Tensor:
    """``mean |w|`` per tensor or channel, without gradient."""
    return w.detach().abs().mean(dim=reduced_axes(w, channel_axis), keepdim=channel_axis is not None)


def decaying_sign(x: Tensor, t: Tensor, k: Tensor, sign_zero: int = 1) -> Tensor:
    """``sign(x)`` with the derivatives of ``k tanh(t x)`` (IR-Net's EDE); the sign of 0 is ``sign_zero``, 1 or 0."""
    sign = torch.sign(x) if sign_zero == 0 else torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return straight_through(sign, k * torch.tanh(t * x))


def magnitude_quantile(x: Tensor, share: float) -> Tensor:
    """The least magnitude such that a share ``share``, above 0, of all elements is not above it; 0-dim."""
    return x.detach().abs().flatten().kthvalue(max(1, math.ceil(share * x.numel()))).values


def active_limit(slope: float) -> float:
    """``|t x|`` up to which ``k tanh(t x)`` has at least the share ``slope`` of its greatest derivative."""
    return math.atanh(math.sqrt(1 - slope))


def capped_estimator(t: Tensor, quantile: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """``(t, k)`` with ``t`` at most what leaves ``quantile`` its slope, but never capped below 1; ``k = max(1/t, 1)``.

    Our reconstruction of DIR-Net's distribution-sensitive estimator: everything up to ``quantile`` keeps at least the
    share ``slope`` of the greatest derivative.
    """
    cap = torch.clamp(active_limit(slope) / torch.clamp(quantile, min=1e-8), min=1)
    t = torch.minimum(t, cap)
    return t, torch.clamp(1 / t, min=1)


class Binary(Quantizer):
    """One bit: ``sign(u) * scale``, with the derivative of ``k tanh(t u)`` in place of the sign's.

    Weights, ``form: libra``: ``u`` is the standardised weight and the scale ``2^round(log2 mean|u|)``, per tensor or
    output channel. ``form: xnor``: ``u`` is the weight and the scale ``mean|w|``. Inputs: ``u`` is the input, the scale
    1, whatever the form. Scales have no gradient; ``scale`` is that of the weights last given to ``codes`` or
    ``initialise``. ``spec.init`` plays no role; at every width but 0 there is one bit.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        form: of weights.
        sign_zero: the sign of 0: 1, or 0 as in IR-Net's code, which is no binary value and cannot be deployed.

    Attributes:
        t, k: of the estimator, 0-dim buffers; 0.1 and 10 (nearly the identity), unless ``callbacks=[dir_net]`` sets
            them.
        quantile: running quantile of an input's magnitudes, 0-dim buffer; 0 until there is one.
        active_share: share of the elements that is to keep a gradient (`capped_estimator`); 0: ``t`` is not capped.
        active_slope: of the greatest derivative, what counts as a gradient.
    """

    max_bits = 1
    magnitude: Tensor
    t: Tensor
    k: Tensor
    quantile: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        form: str = "libra",
        sign_zero: int = 1,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if spec.narrow or spec.signed is False:
            raise ValueError(f"quantizer.{role}: binary codes are -1 and 1, use signed=auto, narrow=false")
        if form not in FORMS:
            raise ValueError(f"quantizer.{role}.options.form={form}: use {' or '.join(FORMS)}")
        if sign_zero not in (0, 1):
            raise ValueError(f"quantizer.{role}.options.sign_zero={sign_zero}: use 1, or 0 as in the official code")
        if role == "weight" and form == "libra" and math.prod(self.shape) < 2 * math.prod(self.state_shape):
            raise ValueError("quantizer.weight.options.form=libra: a filter of one weight has no spread, use xnor")
        self.form = form if role == "weight" else "xnor"
        self.sign_zero = sign_zero
        self.active_share, self.active_slope = 0.0, 1.0
        self.register_buffer("magnitude", torch.ones(self.state_shape))
        self.register_buffer("t", torch.tensor(0.1))
        self.register_buffer("k", torch.tensor(10.0))
        self.register_buffer("quantile", torch.zeros(()))

    @property
    def grid(self) -> Grid:
        """Mid-rise: -1 and 1."""
        return Grid("midrise")

    def limits(self) -> tuple[Tensor, Tensor]:
        """``(-1, 1)``; without bits ``(0, 0)``."""
        one = (self.bits > 0).to(self.bits.dtype)
        return -one, one

    @property
    def scale(self) -> Tensor:
        """Value of the code 1, of ``state_shape``."""
        return self.magnitude

    def _scale(self, u: Tensor) -> Tensor:
        if self.role != "weight":
            return self.magnitude
        found = mean_magnitude(u, self.channel_axis)
        return power_of_two(found) if self.form == "libra" else found

    def transform(self, x: Tensor) -> Tensor:
        """``u``: the standardised weight (libra), or ``x``."""
        return standardised(x, self.channel_axis) if self.form == "libra" else x

    def estimator(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``(t, k)`` for the data ``u``; in training an input's running quantile moves."""
        if not self.active_share:
            return self.t, self.k
        if self.role == "weight":
            return capped_estimator(self.t, magnitude_quantile(u, self.active_share), self.active_slope)
        if self.training and torch.is_grad_enabled():
            found = magnitude_quantile(u, self.active_share)
            moved = DECAY * self.quantile + (1 - DECAY) * found
            self.quantile.copy_(torch.where(self.quantile > 0, moved, found))
        return capped_estimator(self.t, self.quantile, self.active_slope)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """The sign of ``u``, 0 without bits."""
        return decaying_sign(transformed, *self.estimator(transformed), self.sign_zero) * self.limits()[1]

    def dequantize(self, codes: Tensor) -> Tensor:
        """``codes * scale``."""
        return codes.to(self.magnitude.dtype) * self.magnitude

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Sign times scale; without rounding ``k tanh(t u)`` times scale."""
        u = self.transform(x)
        scale = self._scale(u)
        if rounding:
            return self.codes_ste(u) * scale
        t, k = self.estimator(u)
        return k * torch.tanh(t * u) * self.limits()[1] * scale

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` (int32, shape of ``x``); keeps a weight's scale for ``scale``."""
        self.magnitude.copy_(self._scale(self.transform(self._work(x))))
        return super().codes(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Keep a weight's scale; refuse inputs that would all have one code.

        Raises:
            ValueError: an input without negative values.
        """
        if self.role == "weight":
            self.magnitude.copy_(self._scale(self.transform(self._work(x))))
        elif not bool((x < 0).any()):
            raise ValueError(
                "binary inputs without negative values would all be 1, use +model.activation=hardtanh, or bits=32"
            )
        self.initialised.fill_(True)
