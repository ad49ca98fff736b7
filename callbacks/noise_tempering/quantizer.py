"""The tempered quantizer: LSQ whose training output carries decaying noise and whose gradient is scaled by the error.

A reconstruction of Wang, Li, Qu, Metze, Strubell, arXiv 2212.05603, from its abstract: neither the equations nor the
code were available, see docs/methods/noise_tempering.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from callbacks.noise_tempering.gradient import error_aware_gradient, tempered
from callbacks.noise_tempering.noise import NoiseDist, draw
from research.quant.clipping import clip_codes
from research.quant.quantizers.lsq import LSQ
from research.quant.ste import scale_gradient

NoiseSite = Literal["forward", "grad"]
GradScale = Literal["elementwise", "scalar"]
DeltaLearn = Literal["carrier", "shared", "hessian", "fixed"]


@dataclass(frozen=True)
class Tempering:
    """The switches of a tempered quantizer; the names are those of ``callbacks.noise_tempering``.

    Args:
        noisy: whether there is any noise (``lambda_0 > 0``).
        noise_dist: see `draw`.
        noise_site: ``forward`` (on the quantized values) or ``grad`` (on the gradient, in units of its std).
        grad_scale: ``elementwise`` (error-aware) or ``scalar`` (the gradient times ``delta``).
        delta: initial value of the gradient's scale, one per quantizer's scale.
        delta_learn: ``carrier``, ``shared``, ``hessian`` or ``fixed``.
    """

    noisy: bool = True
    noise_dist: NoiseDist = "uniform"
    noise_site: NoiseSite = "forward"
    grad_scale: GradScale = "elementwise"
    delta: float = 0.02
    delta_learn: DeltaLearn = "carrier"


class TemperedLSQ(LSQ):
    """LSQ with, in training only, ``x_hat = Q(v) + lambda e u`` and ``dL/dv = g (1 + delta sign(g) e/s)`` inside.

    ``e = clip(v) - Q(v)`` is a constant of the noise. ``delta`` does not change the output; how it learns:
    ``carrier``: by ``dL/ddelta = gn sum(g e)``, as if the output held ``(delta - sg(delta)) e``; ``shared``: the noise
    is ``lambda delta e u`` and delta gets its true gradient, times ``gn``; ``gn`` is LSQ's gradient factor. In
    evaluation, in mode ``relax`` and with ``plain_ste`` it is LSQ itself.

    Args:
        source: the LSQ quantizer to take the place of.
        tempering: the switches.

    Attributes:
        strength: lambda, 0-dim; set by the mechanic, part of no checkpoint.
        delta: scale of the gradient, of ``state_shape``; a parameter where it learns, else a buffer.
    """

    backward = "gradient_dependent"
    parameter_options = {**LSQ.parameter_options, "delta": {"weight_decay": 0.0}}
    strength: Tensor
    delta: Tensor

    def __init__(self, source: LSQ, tempering: Tempering) -> None:
        super().__init__(
            source.spec,
            source.shape,
            source.channel_axis,
            source.role,
            count_batch=source.count_batch,
            gradient_factor=source.gradient_factor,
            mask=source.mask,
        )
        self.load_state_dict(source.state_dict())
        self.tempering = tempering
        self.register_buffer("strength", torch.zeros(()), persistent=False)
        delta = torch.full(self.state_shape, float(tempering.delta))
        if tempering.delta_learn in ("carrier", "shared"):
            self.delta = nn.Parameter(delta)
        else:
            self.register_buffer("delta", delta)

    @property
    def plain_lsq(self) -> bool:
        """Whether nothing is tempered: no noise, and a gradient scale that is fixed at none."""
        tempering = self.tempering
        unscaled = tempering.delta == 0 and (tempering.delta_learn, tempering.grad_scale) == ("fixed", "elementwise")
        return unscaled and not tempering.noisy

    def plain(self) -> LSQ:
        """The LSQ quantizer with the same state."""
        mask, count, factor = self.mask, self.count_batch, self.gradient_factor
        found = LSQ(self.spec, self.shape, self.channel_axis, self.role, count, factor, mask).to(self.raw_scale)
        found.load_state_dict({name: value for name, value in self.state_dict().items() if name != "delta"})
        return found.train(self.training)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """`LSQ.fake_quantize`, tempered in training."""
        if not (self.training and rounding) or self.plain_ste:
            return super().fake_quantize(x, rounding)
        scale = self.scale
        with torch.no_grad():
            clipped = clip_codes(x / scale, *self.limits(), mask=self.mask)
            codes = torch.round(clipped)
            residual = clipped - codes
            error = residual * scale
            noise = self.strength * draw(self.tempering.noise_dist, error, scale) if self.tempering.noisy else None
        if self.in_one_function:
            delta = self.delta if self.tempering.delta_learn == "carrier" else self.delta.detach()
            return tempered(x, scale, delta, codes, noise, self._make_grid(self._elements(x)))
        return self._with_noise(super().fake_quantize(self._scaled(x, residual, noise)), error, noise)

    @property
    def in_one_function(self) -> bool:
        """Whether training takes one function with all its first derivatives, for the switches that it knows.

        The composition of smaller ones is the reference, and has the others.
        """
        tempering = self.tempering
        known = (tempering.noise_site, tempering.grad_scale, self.mask) == ("forward", "elementwise", "clip_first")
        return self.kernels is not None and known and tempering.delta_learn != "shared"

    def _scaled(self, x: Tensor, residual: Tensor, noise: Tensor | None) -> Tensor:
        on_gradient = noise if self.tempering.noise_site == "grad" else None
        if self.tempering.grad_scale == "elementwise":
            return error_aware_gradient(x, self.delta.detach() * residual, on_gradient)
        if on_gradient is not None:
            x = error_aware_gradient(x, torch.zeros_like(residual), on_gradient)
        return scale_gradient(x, self.delta.detach())

    def _with_noise(self, quantized: Tensor, error: Tensor, noise: Tensor | None) -> Tensor:
        forward_noise = noise if self.tempering.noise_site == "forward" else None
        if self.tempering.delta_learn == "shared":
            assert forward_noise is not None
            return quantized + self._with_factor(self.delta, error) * forward_noise
        if forward_noise is not None:
            quantized = quantized + forward_noise
        if self.tempering.delta_learn == "carrier":
            quantized = quantized + (self._with_factor(self.delta, error) - self.delta.detach()) * error
        return quantized
