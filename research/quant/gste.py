"""Learned thresholds with the generalized straight-through estimator, G-STE (N2UQ, arXiv 2111.14826, section 3.3).

Codes count the thresholds below a number; their derivative is that of a piecewise linear ramp, the mean of stochastic
rounding between two thresholds. As a composition that is differentiable any number of times, and as one function of
first derivatives that keeps nothing but its input; in compiled networks its backward pass is an operator of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from research.quant.compiler import FlatKernel
from research.quant.fused import aligned, dense, flattened, refuse_second_derivatives, shaped, total
from research.quant.kernels import BLOCK

LEAST_LENGTH = 1e-3
Numbers = Any
"""A 1-D tensor, or as many 0-dim ones."""

FEW = 15
"""Segments that are gone through one by one; more are looked up, which costs the same for any number."""


def segments(start: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """``(borders (L + 1,), lengths (L,))`` of the segments from ``start`` (0-dim) and ``a`` (L,), in units of ``u``.

    ``a'_i = max(a_i, 1e-3)``, without gradient where the floor acts; ``d_i = start + a'_1 + ... + a'_i``.
    """
    lengths = torch.where(a > LEAST_LENGTH, a, torch.full_like(a, LEAST_LENGTH))
    return start + F.pad(torch.cumsum(lengths, 0), (1, 0)), lengths


def gste_ramp(u: Tensor, borders: Numbers, lengths: Numbers) -> tuple[Tensor, Tensor]:
    """The piecewise linear surrogate of G-STE and the number of thresholds below ``u``, both of the shape of ``u``.

    With ``d`` the borders and ``a`` the lengths: the ramp is ``i - 1 + (u - d_{i-1}) / a_i`` for
    ``d_{i-1} < u <= d_i``, 0 before and L behind all segments: the mean of stochastic rounding within a segment. The
    thresholds ``T_i = d_{i-1} + a_i / 2`` are where it gives ``i - 1/2``. In units of codes; differentiable twice in
    all three arguments, the count without gradient.
    """
    if len(lengths) <= FEW:
        return _ramp_by_segment(u, borders, lengths)
    return _ramp_by_table(u, borders, lengths)


def stretched(ramp: Tensor, count: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Ramp and codes where the ramp is ``stretch`` (0-dim) times as high; its thresholds stay at the half integers."""
    higher = ramp * stretch
    return higher, torch.where(stretch == 1, count, torch.ceil(higher.detach() - 0.5))


def fused_gste(x: Tensor, scale1: Tensor, step: Tensor, borders: Tensor, lengths: Tensor, stretch: Tensor) -> Tensor:
    """``step`` times the codes of ``scale1 * x`` (shape of ``x``), differentiable once, by G-STE.

    Equal to the composition of `gste_ramp`, `stretched` and the straight-through estimator: the values bit for bit, the
    gradients of all but ``stretch``, which has none, up to rounding.
    """
    result: Tensor = _GSTE.apply(x, scale1, step, borders, lengths, stretch)  # type: ignore[no-untyped-call]
    return result


class _GSTE(torch.autograd.Function):
    """Saves its input and what is smaller."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale1: Tensor, step: Tensor, borders: Tensor, lengths: Tensor, stretch: Tensor
    ) -> Tensor:
        """Quantize and de-quantize."""
        ctx.save_for_backward(x, scale1, step, borders, lengths, stretch)
        return stretched(*gste_ramp(scale1 * x, borders, lengths), stretch)[1] * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With ``h = g step stretch``: ``h / a_i`` at ``u`` within segment i, ``-sum h / a_i`` over it at its lower
        border and ``-sum h (u - d_{i-1}) / a_i^2`` at its length.
        """
        if not torch.compiler.is_compiling():
            refuse_second_derivatives()
        x, scale1, step, borders, lengths, stretch = ctx.saved_tensors
        one_pass = torch.compiler.is_compiling() and not x.is_cuda and len(lengths) <= FEW
        terms = _terms_in_one_pass if one_pass else _terms
        at_x, at_scale1, at_step, inside, beyond = terms(x, grad, scale1, step, borders, lengths, stretch)
        return at_x, at_scale1, at_step, F.pad(-inside / lengths, (0, 1)), -beyond / lengths.square(), None


def _terms(
    x: Tensor, grad: Tensor, scale1: Tensor, step: Tensor, borders: Numbers, lengths: Numbers, stretch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at ``x``, ``scale1`` and ``step``, and the sums by segment that those at borders and lengths are of."""
    u = scale1 * x
    codes = stretched(*gste_ramp(u, borders, lengths), stretch)[1]
    upstream = grad * (step * stretch)
    sums = _sums_by_segment if len(lengths) <= FEW else _sums_by_table
    slope, inside, beyond = sums(u, upstream, borders, lengths)
    at_u = upstream * slope
    return at_u * scale1, total(at_u * x), total(grad * codes), inside, beyond


def _flat_terms(x: Tensor, grad: Tensor, scale1: Tensor, step: Tensor, stretch: Tensor, *numbers: Tensor) -> Any:
    """`_terms` of 1-D tensors; numbers: L + 1 borders, L lengths."""
    count = len(numbers) // 2
    return _terms(x, grad, scale1, step, numbers[: count + 1], numbers[count + 1 :], stretch)


ONE_LOOP = {"realize_reads_threshold": 10_000, "realize_opcount_threshold": 10_000}
"""Compiler options: nothing is written only to be read again."""

compiled_terms = FlatKernel(_flat_terms, BLOCK, ONE_LOOP)


@library.custom_op("flatbit::gste_terms", mutates_args=())
def _terms_in_one_pass(
    x: Tensor, grad: Tensor, scale1: Tensor, step: Tensor, borders: Tensor, lengths: Tensor, stretch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_terms` by a kernel of their own, for networks that are compiled as a whole: fused into the layers around them,
    the dozen sums and masks were written to memory one by one.
    """
    values = dense(x)
    numbers = (scale1, step, stretch, *borders.unbind(), *lengths.unbind())
    at_x, *rest = compiled_terms(flattened(values), flattened(aligned(grad, values)), *numbers)
    return shaped(at_x, values), *rest


@_terms_in_one_pass.register_fake
def _(
    x: Tensor, grad: Tensor, scale1: Tensor, step: Tensor, borders: Tensor, lengths: Tensor, stretch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = x.new_empty(())
    return torch.empty_like(x), number, torch.empty_like(number), torch.empty_like(lengths), torch.empty_like(lengths)


def _ramp_by_segment(u: Tensor, borders: Numbers, lengths: Numbers) -> tuple[Tensor, Tensor]:
    """`gste_ramp`, one comparison with every border: nothing but arithmetic, which a compiler makes one loop of."""
    ramp = count = torch.zeros_like(u)
    for start, end, length in zip(borders[:-1], borders[1:], lengths, strict=True):
        behind = (u > end).to(u.dtype)
        ramp = ramp + torch.where((u > start) & (u <= end), (u - start) * (1 / length), behind)
        count = count + (u > start + length / 2).to(u.dtype)
    return ramp, count


def _ramp_by_table(u: Tensor, borders: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`gste_ramp`, each element's segment looked up."""
    index = torch.bucketize(u.detach().contiguous(), borders.detach())
    inverse = F.pad(1 / lengths, (1, 1))
    table = torch.stack([torch.cat([borders[:1], borders]), inverse], dim=1)
    origin, slope = F.embedding(index, table).unbind(-1)
    below = torch.clamp(index - 1, min=0).to(u.dtype)
    thresholds = F.pad((borders[:-1] + lengths / 2).detach(), (1, 1), value=torch.inf)
    count = below + (u.detach() > thresholds[index]).to(u.dtype)
    return below + (u - origin) * slope, count


def _sums_by_segment(u: Tensor, g: Tensor, borders: Numbers, lengths: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The ramp's slope (shape of ``u``), and over every segment (L,) the sums of ``g`` and of ``g (u - d_{i-1})``."""
    slope = torch.zeros_like(u)
    inside, beyond = [], []
    behind = [(u > border).to(u.dtype) for border in borders]
    for first, last, start, length in zip(behind[:-1], behind[1:], borders[:-1], lengths, strict=True):
        within = first - last
        slope = slope + within / length
        inside.append(total(g * within))
        beyond.append(total(g * within * (u - start)))
    return slope, torch.stack(inside), torch.stack(beyond)


def _sums_by_table(u: Tensor, g: Tensor, borders: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_sums_by_segment`, each element's segment looked up."""
    index = torch.bucketize(u.contiguous(), borders)
    origin = torch.cat([borders[:1], borders])[index]
    places = index.flatten()

    def by_segment(values: Tensor) -> Tensor:
        sums = torch.zeros(len(lengths) + 2, dtype=u.dtype, device=u.device)
        return sums.index_add_(0, places, values.flatten())[1:-1]

    return F.pad(1 / lengths, (1, 1))[index], by_segment(g), by_segment(g * (u - origin))
