"""A batch-norm in training mode whose second derivatives cost little more than its first.

With ``P(v) = v - mean(v) - z mean(v z)`` per channel, z the normalised input and ``i = 1 / sqrt(var + eps)``, the
first derivatives are ``gamma i P(g)``, ``sum g z`` and ``sum g``. P is symmetric and linear, so the second ones are
channelwise combinations of P(g), P(a) and z, where a is the upstream gradient of the first. The library writes them as
some forty passes over the data; here they are two runs of its first-derivative kernel and six passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm`` at ``x`` (N, C, H, W) by the statistics of the batch, which moves the running ones on.

    Differentiable any number of times; fast twice.
    """
    moving = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
    y: Tensor = _Norm.apply(x, norm.weight, norm.bias, *moving, norm.momentum, norm.eps)  # type: ignore[no-untyped-call]
    return y


def batchnorm_forward(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """The module's ``forward`` with `batch_norm`; the library's in evaluation mode."""
    library = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not norm.training:
            return library(x)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return batch_norm(x, norm)

    return forward


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, inverse = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, gamma, mean, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return *_NormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None, None  # type: ignore[no-untyped-call]


class _NormBackward(Function):
    """Gradients of `_Norm`; its own with respect to ``g``, ``x`` and ``gamma``."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(g, x, gamma, mean, inverse)
        ctx.eps = eps
        return _gradients(g, x, gamma, mean, inverse, eps)

    @staticmethod
    def backward(ctx: Any, a: Tensor, a_gamma: Tensor, a_beta: Tensor) -> tuple[Tensor | None, ...]:
        g, x, gamma, mean, inverse = ctx.saved_tensors
        g, x, a = (values.to(gamma.dtype) for values in (g, x, a))  # under autocast they have fewer bits
        axes = [axis for axis in range(x.ndim) if axis != 1]
        if torch.is_grad_enabled():  # a third derivative may follow: all as operations that are recorded
            mean, inverse = x.mean(axes), torch.rsqrt(x.var(axes, correction=0) + ctx.eps)
            (projected_g, along_g), (projected_a, along_a) = (_projection(v, x, mean, inverse, axes) for v in (g, a))
        else:
            one = torch.ones_like(gamma)
            projected_g, along_g, _ = _gradients(g, x, one, mean, inverse, ctx.eps)
            projected_a, along_a, _ = _gradients(a, x, one, mean, inverse, ctx.eps)
        grad_gamma = (a * projected_g).sum(axes)
        factor = gamma * inverse * (gamma.numel() / x.numel())
        slope = a_gamma * inverse
        grad_g = torch.addcmul(_wide(a_beta - slope * mean, x), projected_a, _wide(gamma, x))
        grad_g.addcmul_(x, _wide(slope, x))
        slope = -factor * grad_gamma * inverse
        grad_x = torch.addcmul(_wide(-slope * mean, x), projected_a, _wide(-factor * along_g, x))
        grad_x.addcmul_(projected_g, _wide(a_gamma - factor * along_a, x)).addcmul_(x, _wide(slope, x))
        return grad_g, grad_x, grad_gamma, None, None, None


def _gradients(
    g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma i P(g)``, ``sum g z``, ``sum g``."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, None, None, mean, inverse, True, eps, [True, True, True]
    )
    return found


def _projection(v: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """``i P(v)`` and ``sum v z``."""
    z = (x - _wide(mean, x)) * _wide(inverse, x)
    along = (v * z).sum(axes)
    samples = x.numel() // along.numel()
    return _wide(inverse, x) * (v - v.mean(axes, keepdim=True) - z * _wide(along / samples, x)), along


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) in a shape that broadcasts over the second axis of ``x`` (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
