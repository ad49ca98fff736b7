"""The arithmetic of uniform per-tensor quantizers with one scale, in three forms: on whole tensors; in blocks that stay
in the cache, one pass over memory; compiled. The last two work on flat tensors in memory order: one kernel for every
shape and memory format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from research.quant.compiler import FlatKernel

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

    @property
    def limits(self) -> tuple[Limit, Limit]:
        """Least and greatest code for whole-tensor operations: numbers, which are faster, but tensors on a GPU, which
        would have to wait for them.
        """
        return (self.low, self.high) if self.low.is_cuda else self.bounds


def quantize(x: Tensor, scale: Tensor, low: Limit, high: Limit) -> Tensor:
    """``s round(clip(x / s, low, high))`` of a tensor; ``scale`` is 0-dim (LSQ, equations 1 and 2)."""
    return torch.round(torch.clamp(x / scale, low, high)) * scale


def quantize_backward(x: Tensor, grad: Tensor, scale: Tensor, low: Limit, high: Limit) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize` at ``x`` (its shape) and at the scale (0-dim), straight through (LSQ, equations 3, 5).

    The scale's is ``sum g (round(c) - c)`` with the clipped ``c``, plus ``sum g c`` over what was clipped.
    """
    inside, terms = backward_terms(x, grad, scale, low, high)
    return inside, terms.sum()


def backward_terms(x: Tensor, grad: Tensor, scale: Tensor, low: Limit, high: Limit) -> tuple[Tensor, Tensor]:
    """`quantize_backward` without the sum."""
    codes = x / scale
    clipped = torch.clamp(codes, low, high)
    inside, outside = torch.where(codes == clipped, grad, 0.0), torch.where(codes == clipped, 0.0, grad)
    error = torch.round(clipped) - clipped
    return inside, grad * error + outside * clipped


def requantize_backward(
    x: Tensor, grad: Tensor, scale: Tensor, low: Limit, high: Limit
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_backward` and `quantize` in one pass."""
    return *quantize_backward(x, grad, scale, low, high), quantize(x, scale, low, high)


compiled_quantize = FlatKernel(quantize, BLOCK)
compiled_backward = FlatKernel(quantize_backward, BLOCK)
compiled_requantize_backward = FlatKernel(requantize_backward, BLOCK)


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one block each."""
    return torch.split(flat, _block())


def _block() -> int:
    return BLOCK * torch.get_num_threads()


def blocked_quantize(x: Tensor, scale: Tensor, grid: UniformGrid) -> Tensor:
    """`quantize` of a flat tensor, block by block in place: one read and one write from the memory's point of view."""
    output = torch.empty_like(x)
    for values, target in zip(_blocks(x), _blocks(output), strict=True):
        torch.div(values, scale, out=target)
        target.clamp_(*grid.bounds).round_().mul_(scale)
    return output


def blocked_backward(
    x: Tensor, grad: Tensor, scale: Tensor, grid: UniformGrid, output: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_backward` of flat tensors, block by block in place; with ``output``, which it fills, `quantize` too."""
    least, greatest = grid.bounds
    inside = torch.empty_like(x)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    below, above = _beside(least, x.dtype, -math.inf), _beside(greatest, x.dtype, math.inf)
    first, second = torch.empty_like(x[: _block()]), torch.empty_like(x[: _block()])
    outputs = repeat(second) if output is None else _blocks(output)
    for values, upstream, passed, target in zip(_blocks(x), _blocks(grad), _blocks(inside), outputs, strict=False):
        clipped, rest = first[: values.numel()], target[: values.numel()]
        torch.div(values, scale, out=clipped)
        # the bounds count as inside: hardtanh's do not, so it gets the numbers next to them
        torch.ops.aten.hardtanh_backward.grad_input(upstream, clipped, below, above, grad_input=passed)
        clipped.clamp_(least, greatest)
        total += torch.dot(torch.sub(upstream, passed, out=rest), clipped)
        torch.round(clipped, out=rest)
        total += torch.dot(upstream, torch.sub(rest, clipped, out=clipped))
        if output is not None:
            rest.mul_(scale)
    return inside, total


@cache
def _beside(value: float, dtype: torch.dtype, direction: float) -> float:
    """The number of ``dtype`` next to ``value`` in a direction."""
    neighbour = torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(direction, dtype=dtype))
    return float(neighbour)
