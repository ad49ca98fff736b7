"""The tempered quantizer: LSQ whose training output carries decaying noise and whose gradient is scaled by the error.

A reconstruction of Wang, Li, Qu, Metze, Strubell, arXiv 2212.05603, from its abstract: neither the equations nor the
code were available, see docs/methods/noise_tempering.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research.quant.clipping import clip_codes
from research.quant.quantizers.lsq import LSQ
from research.quant.ste import scale_gradient

NoiseDist = Literal["uniform", "one", "bernoulli", "gauss", "blind"]
NoiseSite = Literal["forward", "grad"]
GradScale = Literal["elementwise", "scalar"]
DeltaLearn = Literal["carrier", "shared", "hessian", "fixed"]


def draw(dist: NoiseDist, error: Tensor, scale: Tensor) -> Tensor:
    """Noise at full strength, shape of ``error``: ``error * u``, with ``u`` fresh from the default generator.

    ``uniform`` U(-1, 1); ``one`` 1; ``bernoulli`` 0 or 1, p = 1/2; ``gauss`` N(0, 1/3). ``blind`` knows nothing of the
    error: ``scale * U(-1/2, 1/2)`` on every element, clipped ones included (pseudo quantization noise).

    Args:
        dist: distribution of ``u``.
        error: ``clip(v) - Q(v)``, in units of the tensor; 0 where clipped.
        scale: width of a bin, broadcastable against ``error``.
    """
    if dist == "uniform":
        return error * (2 * torch.rand_like(error) - 1)
    if dist == "one":
        return error
    if dist == "bernoulli":
        return error * (torch.rand_like(error) < 0.5).to(error.dtype)
    if dist == "gauss":
        return error * torch.randn_like(error) * math.sqrt(1 / 3)
    return scale * (torch.rand_like(error) - 0.5)


class ErrorAwareGradient(torch.autograd.Function):
    """The identity, with the gradient ``g`` turned into ``g + factor |g| + noise std(g)``: not a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
        """``v``."""
        return v.view_as(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep factor and noise."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The scaled upstream gradient."""
        factor, noise = ctx.saved_tensors
        (gradient,) = gradients
        scaled = gradient + factor * gradient.abs()
        return (scaled + noise * gradient.std() if noise.ndim else scaled), None, None


def error_aware_gradient(v: Tensor, factor: Tensor, noise: Tensor | None = None) -> Tensor:
    """``v``; its gradient g becomes ``g (1 + sign(g) factor)``, with ``noise`` also ``+ noise std(g)``.

    With ``factor = delta * (clip(v/s) - round(clip(v/s)))`` this is EWGS's rule in units of bins.

    Args:
        v: latent values, any shape.
        factor: shape of ``v``, no gradient.
        noise: shape of ``v``, no gradient.
    """
    found: Tensor = ErrorAwareGradient.apply(v, factor, v.new_zeros(()) if noise is None else noise)  # type: ignore[no-untyped-call]
    return found


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
        found = LSQ(self.spec, self.shape, self.channel_axis, self.role, count, factor, mask)
        found.load_state_dict({name: value for name, value in self.state_dict().items() if name != "delta"})
        return found.to(self.raw_scale.device).train(self.training)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """`LSQ.fake_quantize`, tempered in training."""
        if not (self.training and rounding) or self.plain_ste:
            return super().fake_quantize(x, rounding)
        with torch.no_grad():
            scale = self.scale
            clipped = clip_codes(x / scale, *self.limits(), mask=self.mask)
            residual = clipped - torch.round(clipped)
            error = residual * scale
            noise = self.strength * draw(self.tempering.noise_dist, error, scale) if self.tempering.noisy else None
        return self._with_noise(super().fake_quantize(self._scaled(x, residual, noise)), error, noise)

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
