"""The fast path of uniform per-tensor quantizers: few passes over memory, nothing saved that can be recomputed.

Same values and same derivatives as the detach form of `research.quant.ste`, which remains the reference: these
functions are differentiable once and say so when asked for more, but for the ``affine`` ones. The arithmetic is mostly
written on flat tensors in memory order, so that one kernel serves every shape and memory format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from research.quant.compiler import compiler_options

Kernels = Literal["eager", "compiled", "traced", "affine"]
"""``traced``: for a network that is compiled as a whole, which fuses it into the layers around it; ``affine``: for
derivatives of any order."""
WITH_CONVOLUTION: tuple[Kernels, ...] = ("eager", "compiled")
"""Kernels that are one node with the convolution behind them."""
Limit = Any
"""A float, or a 0-dim tensor."""

BLOCK = 1 << 15
"""Elements that stay in a core's cache over all operations on them (128 KiB of float32), and the fewest that torch
gives to one thread: a block has as many for every thread."""


@dataclass(frozen=True)
class UniformGrid:
    """What a fused quantizer needs to know besides its input and its scale; 0-dim tensors: one graph for every width.

    Attributes:
        low: least code.
        high: greatest code.
        gradient_factor: what the gradient of the scale is multiplied by.
    """

    low: Tensor
    high: Tensor
    gradient_factor: Tensor

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest code as numbers."""
        return float(self.low), float(self.high)


def quantize(x: Tensor, scale: Tensor, low: Limit, high: Limit) -> Tensor:
    """``s round(clip(x / s, low, high))`` of a flat tensor; ``scale`` is 0-dim (LSQ, equations 1 and 2)."""
    return torch.round(torch.clamp(x / scale, low, high)) * scale


def quantize_backward(x: Tensor, scale: Tensor, grad: Tensor, low: Limit, high: Limit) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize` at ``x`` (its shape) and at the scale (0-dim), straight through (LSQ, equations 3, 5).

    The scale's is ``sum g (round(c) - c)`` with the clipped ``c``, plus ``sum g c`` over what was clipped.
    """
    inside, terms = _backward_terms(x, scale, grad, low, high)
    return inside, terms.sum()


def _backward_terms(x: Tensor, scale: Tensor, grad: Tensor, low: Limit, high: Limit) -> tuple[Tensor, Tensor]:
    """`quantize_backward` without the sum."""
    codes = x / scale
    clipped = torch.clamp(codes, low, high)
    inside = torch.where(codes == clipped, grad, 0.0)
    error = torch.round(clipped) - clipped
    return inside, grad * error + (grad - inside) * clipped


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one block each."""
    return torch.split(flat, _block())


def _block() -> int:
    return BLOCK * torch.get_num_threads()


def _blocked_quantize(x: Tensor, scale: Tensor, grid: UniformGrid) -> Tensor:
    """`quantize`, block by block in place: one read of ``x`` and one write from the memory's point of view."""
    output = torch.empty_like(x)
    for values, target in zip(_blocks(x), _blocks(output), strict=True):
        torch.div(values, scale, out=target)
        target.clamp_(*grid.bounds).round_().mul_(scale)
    return output


def _blocked_quantize_backward(x: Tensor, scale: Tensor, grad: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """`quantize_backward`, block by block in place."""
    least, greatest = grid.bounds
    output = torch.empty_like(x)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    size = min(_block(), x.numel())
    below, above = _beside(least, x.dtype, -math.inf), _beside(greatest, x.dtype, math.inf)
    first, second = torch.empty_like(x[:size]), torch.empty_like(x[:size])
    for values, upstream, target in zip(_blocks(x), _blocks(grad), _blocks(output), strict=True):
        clipped, rest = first[: values.numel()], second[: values.numel()]
        torch.div(values, scale, out=clipped)
        # the bounds count as inside: hardtanh's do not, so it gets the numbers next to them
        torch.ops.aten.hardtanh_backward.grad_input(upstream, clipped, below, above, grad_input=target)
        clipped.clamp_(least, greatest)
        torch.round(clipped, out=rest)
        total += torch.dot(upstream, rest.sub_(clipped))
        total += torch.dot(torch.sub(upstream, target, out=rest), clipped)
    return output, total


@cache
def _beside(value: float, dtype: torch.dtype, direction: float) -> float:
    """The number of ``dtype`` next to ``value`` in a direction."""
    neighbour = torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(direction, dtype=dtype))
    return float(neighbour)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one graph for tensors of every length."""
    return _compiled_for(function, torch.get_num_threads())


@cache
def _compiled_for(function: Callable[..., Any], threads: int) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True, options=compiler_options(threads))


def _at_once(x: Tensor, kernels: Kernels) -> bool:
    """Whether ``x`` takes the plain operations: on a GPU unless they are compiled, elsewhere where it is short.

    The call of a compiled kernel costs more than a short tensor's arithmetic, and one first compiled for a short tensor
    would use a single thread for tensors of every length.
    """
    return kernels == "eager" if x.is_cuda else x.numel() <= BLOCK


def _forward(x: Tensor, scale: Tensor, grid: UniformGrid, kernels: Kernels) -> Tensor:
    """De-quantized ``x``, float32 or wider, in its memory format."""
    values = x if x.dtype == torch.float64 else x.float()
    if _at_once(values, kernels):
        return quantize(values, scale, grid.low, grid.high)
    values = _dense(values)
    if kernels == "compiled":
        flat = _compiled(quantize)(_flat(values), scale.detach(), grid.low, grid.high)
    else:
        flat = _blocked_quantize(_flat(values), scale, grid)
    return _shaped(flat, values)


def _backward(x: Tensor, scale: Tensor, grad: Tensor, grid: UniformGrid, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Gradients at ``x`` (its dtype) and at the scale."""
    values = x if x.dtype == torch.float64 else x.float()
    upstream = grad.to(values.dtype)
    if _at_once(values, kernels):
        inside, total = quantize_backward(values, scale, upstream, grid.low, grid.high)
        return inside.to(x.dtype), total * grid.gradient_factor
    values = _dense(values)
    if upstream.stride() != values.stride():
        upstream = torch.empty_like(values).copy_(upstream)
    arguments = _flat(values), scale.detach(), _flat(upstream)
    if kernels == "compiled":
        flat, total = _compiled(quantize_backward)(*arguments, grid.low, grid.high)
    else:
        flat, total = _blocked_quantize_backward(*arguments, grid)
    return _shaped(flat, values).to(x.dtype), total * grid.gradient_factor


def _dense(x: Tensor) -> Tensor:
    """``x`` in memory without gaps or overlaps, its memory format kept."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone(memory_format=torch.preserve_format)


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, 1-D, on the same memory.

    No view: whether a tensor requires a gradient and what it is a view of would each be a reason for another graph.
    """
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,)
    )


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
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
    """Saves its input and the scale, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: UniformGrid, kernels: Kernels) -> Tensor:
        """Quantize and de-quantize."""
        ctx.save_for_backward(x, scale)
        ctx.grid, ctx.kernels = grid, kernels
        return _forward(x, scale, grid, kernels).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through inside the range."""
        refuse_second_derivatives()
        x, scale = ctx.saved_tensors
        return *_backward(x, scale, grad, ctx.grid, ctx.kernels), None, None


class _TracedFakeQuantize(torch.autograd.Function):
    """The same on whole tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
        """Quantize and de-quantize."""
        ctx.save_for_backward(x, scale, low, high, factor)
        return quantize(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through inside the range."""
        if not torch.compiler.is_compiling():
            refuse_second_derivatives()
        x, scale, low, high, factor = ctx.saved_tensors
        inside, terms = _backward_terms(x, scale, grad, low, high)
        return inside, total(terms) * factor, None, None, None


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
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: UniformGrid,
        convolution: Convolution,
        kernels: Kernels,
    ) -> Tensor:
        """Quantize the input and convolve it with the (quantized) weight."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weight = weight.to(dtype)
        ctx.save_for_backward(x, scale, weight)
        ctx.grid, ctx.convolution, ctx.kernels, ctx.bias = grid, convolution, kernels, bias
        x_hat = _forward(x, scale, grid, kernels).to(dtype)
        return convolution(x_hat, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The convolution's gradients, the input's carried through the quantizer."""
        refuse_second_derivatives()
        x, scale, weight = ctx.saved_tensors
        x_hat = _forward(x, scale, ctx.grid, ctx.kernels).to(weight.dtype)
        need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_x, grad_weight, grad_bias = ctx.convolution.backward(
            grad, x_hat, weight, ctx.bias, (need_x, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        )
        del x_hat
        grad_scale = None
        if need_x:
            grad_x, grad_scale = _backward(x, scale, grad_x, ctx.grid, ctx.kernels)
        return grad_x, grad_scale, grad_weight, grad_bias, None, None, None


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


def fused_fake_quantize(x: Tensor, scale: Tensor, grid: UniformGrid, kernels: Kernels = "eager") -> Tensor:
    """Fake-quantize ``x`` (any shape, its dtype) with a 0-dim ``scale``; arithmetic in float32 or wider.

    Equal to the detach form: the values bit for bit, the gradients up to rounding. Differentiable once; ``affine``: any
    number of times.
    """
    if kernels in WITH_CONVOLUTION:
        result: Tensor = _FakeQuantize.apply(x, scale, grid, kernels)  # type: ignore[no-untyped-call]
        return result
    values = x if x.dtype == torch.float64 else x.float()
    if kernels == "traced":
        result = _TracedFakeQuantize.apply(values, scale, grid.low, grid.high, grid.gradient_factor)  # type: ignore[no-untyped-call]
    else:
        result, _, _ = _AffineFakeQuantize.apply(values, scale, grid.low, grid.high, grid.gradient_factor)  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


def fused_quantized_convolution(
    x: Tensor,
    scale: Tensor,
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
    result: Tensor = _QuantizedConvolution.apply(x, scale, weight, bias, grid, convolution, kernels)  # type: ignore[no-untyped-call]
    return result
