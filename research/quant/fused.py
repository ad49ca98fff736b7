"""The fast path of uniform per-tensor quantizers: few passes over memory, nothing saved that can be recomputed.

Same values and same derivatives as the detach form of `research.quant.ste`, which remains the reference: these
functions are differentiable once and say so when asked for more, but for the ``affine`` ones. The arithmetic is that of
`research.quant.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from research.quant.kernels import (
    BLOCK,
    UniformGrid,
    backward_terms,
    blocked_backward,
    blocked_quantize,
    compiled_backward,
    compiled_quantize,
    compiled_requantize_backward,
    positive,
    positive_slope,
    quantize,
    quantize_backward,
)

Kernels = Literal["eager", "compiled", "traced", "affine"]
"""``traced``: for a network that is compiled as a whole, which fuses it into the layers around it; ``affine``: for
derivatives of any order."""
WITH_CONVOLUTION: tuple[Kernels, ...] = ("eager", "compiled")
"""Kernels that are one node with the convolution behind them."""


def _whole(x: Tensor, kernels: Kernels) -> bool:
    """Whether ``x`` takes whole-tensor operations, the eager form on a GPU and of short tensors."""
    return kernels == "eager" and (x.is_cuda or x.numel() <= BLOCK)


def _forward(x: Tensor, raw: Tensor, grid: UniformGrid, kernels: Kernels) -> Tensor:
    """De-quantized ``x``, float32 or wider, in its memory format."""
    values = x if x.dtype == torch.float64 else x.float()
    if _whole(values, kernels):
        return quantize(values, raw, *grid.limits)
    values = dense(values)
    if kernels == "compiled":
        flat = compiled_quantize(flattened(values), raw.detach(), grid.low, grid.high)
    else:
        flat = blocked_quantize(flattened(values), raw, grid)
    return shaped(flat, values)


def _backward(
    x: Tensor, raw: Tensor, grad: Tensor, grid: UniformGrid, kernels: Kernels, requantize: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients at ``x`` (its dtype) and at ``raw``; with ``requantize`` also what `_forward` gave."""
    values = x if x.dtype == torch.float64 else x.float()
    upstream = grad.to(values.dtype)
    output: Tensor | None = None
    if _whole(values, kernels):
        floor = 0.0 if grid.rectified else None
        inside, slope = quantize_backward(values, upstream, raw, grid.gradient_factor, *grid.limits, floor)
        output = quantize(values, raw, *grid.limits) if requantize else None
        return inside.to(x.dtype), slope, output
    values = dense(values)
    flats = flattened(values), flattened(aligned(upstream, values)), raw.detach()
    constants = grid.gradient_factor, grid.low, grid.high, grid.floor
    if kernels == "eager":
        output = torch.empty_like(flats[0]) if requantize else None
        inside, slope = blocked_backward(*flats, grid, output)
    elif requantize:
        inside, slope, output = compiled_requantize_backward(*flats, *constants)
    else:
        inside, slope = compiled_backward(*flats, *constants)
    if output is not None:
        output = shaped(output, values)
    return shaped(inside, values).to(x.dtype), slope, output


def dense(x: Tensor) -> Tensor:
    """``x`` in memory without gaps or overlaps, its memory format kept."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone(memory_format=torch.preserve_format)


def aligned(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of ``like``."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def flattened(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, 1-D."""
    return x.as_strided((x.numel(),), (1,))


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Elements in memory order as a tensor of the shape and strides of ``like``."""
    return flat.as_strided(like.shape, like.stride())


def refuse_second_derivatives() -> None:
    """An error where a graph of the backward pass is asked for: parts of it would be missing without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused quantizers have first derivatives only: evaluate inside "
            "research.learning.double_backward.twice_differentiable(net), and declare needs_double_backward"
        )


def total(terms: Tensor) -> Tensor:
    """The sum (0-dim), taken by channel first, as a batch-norm's sums are: a compiler makes one loop of them."""
    return terms.sum([axis for axis in range(terms.ndim) if axis != 1]).sum()


class _FakeQuantize(torch.autograd.Function):
    """Saves its input and what the scale is made of, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, grid: UniformGrid, kernels: Kernels) -> Tensor:
        """Quantize and de-quantize."""
        ctx.save_for_backward(x, raw)
        ctx.grid, ctx.kernels = grid, kernels
        return _forward(x, raw, grid, kernels).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through inside the range."""
        refuse_second_derivatives()
        x, raw = ctx.saved_tensors
        return *_backward(x, raw, grad, ctx.grid, ctx.kernels)[:2], None, None


class _TracedFakeQuantize(torch.autograd.Function):
    """The same on whole tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
        """Quantize and de-quantize."""
        ctx.save_for_backward(x, raw, low, high, factor)
        return quantize(x, raw, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through inside the range."""
        if not torch.compiler.is_compiling():
            refuse_second_derivatives()
        x, raw, low, high, factor = ctx.saved_tensors
        inside, terms = backward_terms(x, grad, positive(raw), low, high)
        return inside, total(terms) * factor * positive_slope(raw), None, None, None


class _AffineFakeQuantize(torch.autograd.Function):
    """Straight through, LSQ is ``m x + k s`` with constants m (0 or 1) and k: ``k = round(c) - c`` inside the range and
    the bound outside. So its backward pass is linear in the upstream gradient, and recorded as it is has every higher
    derivative right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized and de-quantized ``x``, m (bool) and k."""
        codes = x / scale
        clipped = torch.clamp(codes, low, high)
        inside, rounded = codes == clipped, torch.round(clipped)
        return rounded * scale, inside, rounded - torch.where(inside, clipped, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the constants."""
        kept = (*output[1:], inputs[-1])
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *constants: Any) -> tuple[Tensor | None, ...]:
        """The linear map's transpose."""
        inside, slope, factor = ctx.saved_tensors
        return grad * inside, (grad * slope).sum() * factor, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, scale: Tensor, *constants: Any) -> tuple[Tensor | None, ...]:
        """The linear map."""
        inside, slope, factor = ctx.saved_tensors
        return x * inside + scale * factor * slope, None, None


class _QuantizedConvolution(torch.autograd.Function):
    """Quantizer and convolution in one: the de-quantized input is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        raw: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: UniformGrid,
        convolution: Convolution,
        kernels: Kernels,
    ) -> Tensor:
        """Quantize the input and convolve it with the (quantized) weight."""
        dtype = convolution_dtype(x)
        weight = weight.to(dtype)
        ctx.save_for_backward(x, raw, weight)
        ctx.grid, ctx.convolution, ctx.kernels, ctx.bias = grid, convolution, kernels, bias
        x_hat = _forward(x, raw, grid, kernels).to(dtype)
        return convolution(x_hat, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The convolution's gradients, the input's carried through the quantizer."""
        refuse_second_derivatives()
        x, raw, weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        need_weight, need_bias = ctx.needs_input_grad[2:4]
        grad_x = grad_raw = grad_weight = grad_bias = x_hat = None
        inputs = torch.empty_like(x, dtype=weight.dtype)  # of which the input's gradient takes nothing but the shape
        if need_x:  # it comes first: one pass then takes it through the quantizer and makes the quantized input again
            grad_x, _, _ = ctx.convolution.backward(grad, inputs, weight, ctx.bias, (True, False, False))
            grad_x, grad_raw, x_hat = _backward(x, raw, grad_x, ctx.grid, ctx.kernels, requantize=need_weight)
        elif need_weight:
            x_hat = _forward(x, raw, ctx.grid, ctx.kernels)
        if need_weight or need_bias:
            inputs = inputs if x_hat is None else x_hat.to(weight.dtype)
            _, grad_weight, grad_bias = ctx.convolution.backward(
                grad, inputs, weight, ctx.bias, (False, need_weight, need_bias)
            )
        return grad_x, grad_raw, grad_weight, grad_bias, None, None, None


def convolution_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of ``x`` runs in: the dtype of autocast where that is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution's constants, zero padded, and its two directions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients at input, weight and bias, as far as ``needed``."""
        gradients = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None if bias is None else list(bias.shape),
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            needed,
        )
        return cast("tuple[Tensor | None, Tensor | None, Tensor | None]", gradients)


def fused_fake_quantize(x: Tensor, raw: Tensor, grid: UniformGrid, kernels: Kernels = "eager") -> Tensor:
    """Fake-quantize ``x`` (any shape, its dtype) with the scale ``positive(raw)``, 0-dim; in float32 or wider.

    Equal to the detach form: the values bit for bit, the gradients up to rounding. Differentiable once; ``affine``: any
    number of times.
    """
    if kernels in WITH_CONVOLUTION:
        result: Tensor = _FakeQuantize.apply(x, raw, grid, kernels)  # type: ignore[no-untyped-call]
        return result
    values = x if x.dtype == torch.float64 else x.float()
    if kernels == "traced":
        result = _TracedFakeQuantize.apply(values, raw, grid.low, grid.high, grid.gradient_factor)  # type: ignore[no-untyped-call]
    else:
        scale = positive(raw)
        result, _, _ = _AffineFakeQuantize.apply(values, scale, grid.low, grid.high, grid.gradient_factor)  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


def fused_quantized_convolution(
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: UniformGrid,
    convolution: Convolution,
    kernels: Kernels = "eager",
) -> Tensor:
    """Convolution of the fake-quantized ``x`` (N, C, H, W); saves ``x`` for the backward pass, not what it becomes.

    ``x`` is mostly the output of a ReLU, which keeps it anyway. Under autocast the convolution runs in its dtype.
    Differentiable once.
    """
    result: Tensor = _QuantizedConvolution.apply(x, raw, weight, bias, grid, convolution, kernels)  # type: ignore[no-untyped-call]
    return result
