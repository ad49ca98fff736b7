"""Error-aware gradients of noise tempering, a reconstruction: of the identity, and of a whole tempered quantizer in one
function. The rule is that of EWGS (Lee, Kim, Ham, CVPR 2021) in units of bins; the scale's gradient is LSQ's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from research.quant.fused import refuse_second_derivatives, total
from research.quant.kernels import UniformGrid


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


class _Tempered(torch.autograd.Function):
    """Saves the input and what is 0-dim or per channel, and computes all else again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, delta: Tensor, codes: Tensor, noise: Tensor, low: Tensor, high: Tensor, factor: Tensor
    ) -> Tensor:
        """De-quantized codes, with the noise."""
        quantized = codes * scale
        return quantized + noise if noise.ndim else quantized

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the input and its grid."""
        x, scale, delta, _, _, low, high, factor = inputs
        ctx.save_for_backward(x, scale, delta, low, high, factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through inside the range, scaled by the error."""
        if not torch.compiler.is_compiling():
            refuse_second_derivatives()
        x, scale, delta, low, high, factor = ctx.saved_tensors
        (grad,) = gradients
        codes = x / scale
        clipped = torch.clamp(codes, low, high)
        inside, outside = torch.where(codes == clipped, grad, 0.0), torch.where(codes == clipped, 0.0, grad)
        residual = clipped - torch.round(clipped)
        grad_x = inside + delta * residual * inside.abs()
        grad_scale = factor * _summed(outside * clipped - grad * residual, scale)
        grad_delta = factor * _summed(grad * residual * scale, delta)
        return grad_x, grad_scale, grad_delta, None, None, None, None, None


def _summed(terms: Tensor, like: Tensor) -> Tensor:
    """The sum over everything that shares a value of ``like``."""
    return terms.sum_to_size(like.shape) if like.ndim else total(terms)


def tempered(x: Tensor, scale: Tensor, delta: Tensor, codes: Tensor, noise: Tensor | None, grid: UniformGrid) -> Tensor:
    """``s codes + noise``; its gradients are those of LSQ, ``dL/dx`` error-aware and ``dL/ddelta`` by the carrier.

    With the upstream gradient g, ``c = clip(x / s)`` and ``r = c - round(c)``: ``dL/dx = g (1 + delta sign(g) r)``
    inside the range, ``dL/ds = gn sum(g (round(c) - x / s))`` inside it and ``gn sum(g c)`` outside, and
    ``dL/ddelta = gn sum(g s r)``; ``gn`` is LSQ's factor. Differentiable once.

    Args:
        x: latent values, any shape.
        scale: width of a bin, 0-dim or broadcastable.
        delta: scale of the gradient, shape of ``scale``.
        codes: ``round(c)``, no gradient.
        noise: shape of ``x``, no gradient.
        grid: least and greatest code, and ``gn``.
    """
    constant = x.new_zeros(()) if noise is None else noise
    found: Tensor = _Tempered.apply(x, scale, delta, codes, constant, grid.low, grid.high, grid.gradient_factor)  # type: ignore[no-untyped-call]
    return found
