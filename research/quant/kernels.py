"""The arithmetic of uniform per-tensor quantizers with one scale, in three forms: on whole tensors; in blocks that stay
in the cache, one pass over memory; compiled. The last two work on flat tensors in memory order: one kernel for every
shape and memory format. They take the trained number that the scale is made of: a dozen operations on single numbers,
each recorded for derivatives, would cost as much as a small layer.
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
from research.quant.ranges import EPS

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
        rectified: numbers up to zero, the least code, pass no gradient on, as if a ReLU stood in front.
    """

    low: Tensor
    high: Tensor
    gradient_factor: Tensor
    rectified: bool = False

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

    @cached_property
    def floor(self) -> Tensor:
        """Of `quantize_backward`, for a compiled kernel that serves every grid."""
        return self.low if self.rectified else torch.full_like(self.low, -math.inf)


def positive(raw: Tensor) -> Tensor:
    """The scale that a trained number stands for: ``max(|raw|, eps)``."""
    return torch.clamp(raw.abs(), min=EPS)


def positive_slope(raw: Tensor) -> Tensor:
    """The derivative of `positive`: -1, 0 or 1."""
    return torch.where(raw.abs() >= EPS, torch.sgn(raw), 0.0)


def quantize(x: Tensor, raw: Tensor, low: Limit, high: Limit) -> Tensor:
    """``s round(clip(x / s, low, high))`` of a tensor, ``s = positive(raw)`` 0-dim (LSQ, equations 1 and 2)."""
    scale = positive(raw)
    return torch.round(torch.clamp(x / scale, low, high)) * scale


def quantize_backward(
    x: Tensor, grad: Tensor, raw: Tensor, factor: Tensor, low: Limit, high: Limit, floor: Limit | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize` at ``x`` (its shape) and at ``raw`` (0-dim), straight through (LSQ, equations 3, 5).

    The scale's is ``sum g (round(c) - c)`` with the clipped ``c``, plus ``sum g c`` over what was clipped, times
    ``factor``. An ``x`` up to ``floor`` gets none.
    """
    inside, terms = backward_terms(x, grad, positive(raw), low, high)
    inside = inside if floor is None else torch.where(x > floor, inside, 0.0)
    return inside, terms.sum() * factor * positive_slope(raw)


def backward_terms(x: Tensor, grad: Tensor, scale: Tensor, low: Limit, high: Limit) -> tuple[Tensor, Tensor]:
    """Gradients of `quantize` at ``x`` and at the scale, the latter before its terms are summed."""
    codes = x / scale
    clipped = torch.clamp(codes, low, high)
    inside, outside = torch.where(codes == clipped, grad, 0.0), torch.where(codes == clipped, 0.0, grad)
    error = torch.round(clipped) - clipped
    return inside, grad * error + outside * clipped


def requantize_backward(
    x: Tensor, grad: Tensor, raw: Tensor, factor: Tensor, low: Limit, high: Limit, floor: Limit | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_backward` and `quantize` in one pass."""
    return *quantize_backward(x, grad, raw, factor, low, high, floor), quantize(x, raw, low, high)


compiled_quantize = FlatKernel(quantize, BLOCK)
compiled_backward = FlatKernel(quantize_backward, BLOCK)
compiled_requantize_backward = FlatKernel(requantize_backward, BLOCK)


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one block each."""
    return torch.split(flat, _block())


def _block() -> int:
    return BLOCK * torch.get_num_threads()


def blocked_quantize(x: Tensor, raw: Tensor, grid: UniformGrid) -> Tensor:
    """`quantize` of a flat tensor, block by block in place: one read and one write from the memory's point of view."""
    output, scale = torch.empty_like(x), positive(raw)
    for values, target in zip(_blocks(x), _blocks(output), strict=True):
        torch.div(values, scale, out=target)
        target.clamp_(*grid.bounds).round_().mul_(scale)
    return output


def blocked_backward(
    x: Tensor, grad: Tensor, raw: Tensor, grid: UniformGrid, output: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_backward` of flat tensors, block by block in place; with ``output``, which it fills, `quantize` too."""
    least, greatest = grid.bounds
    inside, scale = torch.empty_like(x), positive(raw)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    below = least if grid.rectified else _beside(least, x.dtype, -math.inf)
    above = _beside(greatest, x.dtype, math.inf)
    first, second = torch.empty_like(x[: _block()]), torch.empty_like(x[: _block()])
    outputs = repeat(second) if output is None else _blocks(output)
    for values, upstream, passed, target in zip(_blocks(x), _blocks(grad), _blocks(inside), outputs, strict=False):
        clipped, rest = first[: values.numel()], target[: values.numel()]
        torch.div(values, scale, out=clipped)
        # the bounds count as inside, but for the zeros of a ReLU: hardtanh's do not, so it gets the numbers beside them
        torch.ops.aten.hardtanh_backward.grad_input(upstream, clipped, below, above, grad_input=passed)
        clipped.clamp_(least, greatest)
        total += torch.dot(torch.sub(upstream, passed, out=rest), clipped)
        torch.round(clipped, out=rest)
        total += torch.dot(upstream, torch.sub(rest, clipped, out=clipped))
        if output is not None:
            rest.mul_(scale)
    return inside, total * grid.gradient_factor * positive_slope(raw)


@cache
def _beside(value: float, dtype: torch.dtype, direction: float) -> float:
    """The number of ``dtype`` next to ``value`` in a direction."""
    neighbour = torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(direction, dtype=dtype))
    return float(neighbour)
