"""The formulas of Edge-MPQ (Schaefer, Joshi, Li, Blazquez, WACV 2024, arXiv 2206.07741), after the official code.

Throughout d is a step, xmax a range, ``k = round(xmax / d)`` the greatest code; all shapes broadcast.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from research.quant.ranges import three_sigma_range
from research.quant.ste import round_ste, straight_through

Surrogate = Literal["ste", "ewgs", "tanh", "invtanh", "acos", "psgd"]
SURROGATES: tuple[Surrogate, ...] = get_args(Surrogate)
GRADIENT_DEPENDENT: tuple[Surrogate, ...] = ("ewgs", "tanh", "invtanh")
"""Surrogates whose slope depends on the sign of the upstream gradient."""
GAP = 1e-5
"""Least distance of a step from its range, and of both from their limits."""
INVTANH_REACH = 0.95


class ScaledRound(torch.autograd.Function):
    """Rounding with the derivative ``g + |g| pull``: the slope ``1 + sign(g) pull`` depends on the gradient ``g``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, pull: Tensor) -> Tensor:
        """``round(u)``, half to even."""
        return torch.round(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the pull."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The scaled upstream gradient."""
        (pull,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient + gradient.abs() * pull, None


def slope_excess(e: Tensor, surrogate: Surrogate, mix: float = 1.0) -> Tensor:
    """``f(e)`` of a gradient-dependent surrogate, whose slope is ``1 + delta sign(g) f(e)`` (official code).

    ``ewgs``: ``e``; ``tanh``: ``tanh(4 e) / 2``; ``invtanh``: ``atanh(1.9 e) / (2 atanh 0.95)``; the last two with
    ``mix`` of themselves and the rest of ``ewgs``.

    Args:
        e: rounding errors ``u - round(u)`` in [-1/2, 1/2], any shape.
        surrogate: one of `GRADIENT_DEPENDENT`.
        mix: share of the surrogate's own form.
    """
    if surrogate == "ewgs":
        return e
    if surrogate == "tanh":
        own = 0.5 * torch.tanh(4 * e)
    else:
        own = 0.5 / math.atanh(INVTANH_REACH) * torch.atanh(2 * INVTANH_REACH * e)
    return mix * own + (1 - mix) * e


def surrogate_round(u: Tensor, surrogate: Surrogate, delta: float, mix: float = 1.0) -> Tensor:
    """``round(u)``, half to even, with a surrogate slope; ``delta = 0`` is the straight-through estimator.

    ``acos`` has the slope ``1 + delta sin(pi e) / 2``, ``psgd`` ``1 + delta |e|`` (the newest version of the official
    code); these are derivatives of a function of ``u``, so that higher ones exist. Others: `slope_excess`.

    Args:
        u: in units of codes, any shape.
        surrogate: the rule.
        delta: its strength (``g_scale``); no gradient.
        mix: see `slope_excess`.
    """
    rounded = torch.round(u)
    if surrogate == "ste" or delta == 0:
        return straight_through(rounded, u)
    e = u - rounded.detach()
    if surrogate == "acos":
        return straight_through(rounded, u - delta * torch.cos(math.pi * e) / (2 * math.pi))
    if surrogate == "psgd":
        return straight_through(rounded, u + delta * e * e.abs() / 2)
    found: Tensor = ScaledRound.apply(u, delta * slope_excess(e.detach(), surrogate, mix))  # type: ignore[no-untyped-call]
    return found


def in_codes(x: Tensor, d: Tensor, xmax: Tensor, signed: Tensor) -> Tensor:
    """``u = clip(x / xmax, lo, 1) xmax / d`` with ``lo = -1`` if signed, else 0 (official code).

    Where ``x`` is exactly at a bound its derivative is half of that inside.
    """
    unit = torch.maximum(torch.minimum(x / xmax, torch.ones_like(xmax)), -signed.to(x.dtype))
    return unit * xmax / d


def power_of_two_step(d: Tensor) -> Tensor:
    """``2^round(log2 d)``, straight through (an older version of the official code): its slope is its value over d."""
    return torch.exp2(round_ste(torch.log2(d)))


def top_code(bits: Tensor, signed: Tensor) -> Tensor:
    """Greatest code of ``bits``: ``2^(bits - 1) - 1`` signed, ``2^bits - 1`` unsigned; the codes are symmetric."""
    return torch.exp2(bits - signed.to(bits.dtype)) - 1


def width(d: Tensor, xmax: Tensor, signed: Tensor, least: int) -> Tensor:
    """``max(ceil(log2(k + 1)) + [signed], least)`` with the derivative of ``log2(xmax / d + 1)`` at k (official code).

    The derivative is 0 where the width is ``least``. The logarithm is taken of the integer, by its binary exponent:
    nothing is lost where ``k + 1`` is a power of two.
    """
    k = round_ste(xmax / d)
    magnitude = torch.frexp(k.detach()).exponent.to(k.dtype)
    bits = straight_through(magnitude, torch.log2(k + 1)) + signed.to(k.dtype)
    return torch.where(bits > least, bits, torch.full_like(bits, least))


def ramp(progress: float, until: float) -> float:
    """``rho``: from 0.01 linearly to 1 at ``until``, then 1 (official code: over the first half of the steps)."""
    return 0.01 + 0.99 * min(1.0, progress / until)


def projected(
    d: Tensor, xmax: Tensor, steps: tuple[float, float], ranges: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """A step below its range, both within their limits (official code).

    ``d <- min(d, xmax - 1e-5)``, ``xmax <- max(xmax, d + 1e-5)`` of the old values, then both at least 1e-5 inside.
    """
    low, high = (torch.minimum(d, xmax - GAP), torch.maximum(d + GAP, xmax))
    return low.clamp(steps[0] + GAP, steps[1] - GAP), high.clamp(ranges[0] + GAP, ranges[1] - GAP)


def percentile(magnitudes: Tensor, share: float) -> Tensor:
    """The value below which ``share`` of all values lie, linearly interpolated between neighbours; 0-dim."""
    values = magnitudes.flatten()
    position = share * (values.numel() - 1)
    below = int(position)
    first = values.kthvalue(below + 1).values
    second = values.kthvalue(min(below + 2, values.numel())).values
    return first + (position - below) * (second - first)


def initial_range(x: Tensor, weight: bool, channel_axis: int | None, bits: Tensor) -> Tensor:
    """``xmax`` for data, one per channel or 0-dim (official code).

    Weights: ``max(|mean - 3 std|, |mean + 3 std|)`` with the population's std. Others: the 99.9th percentile of |x|.
    ``2^-bits`` if all data are 0, and 1 where the outcome is 0.

    Args:
        x: the data.
        weight: which of the two rules.
        channel_axis: axis with a range per index, None for one range; of weights.
        bits: the width to start with, in the shape of the outcome.
    """
    if weight:
        low, high = three_sigma_range(x, channel_axis)
        found = torch.maximum(low.abs(), high.abs())
    else:
        found = percentile(x.abs(), 0.999)
    if not bool(x.any()):
        found = torch.exp2(-bits).to(found.dtype)
    return torch.where(found == 0, torch.ones_like(found), found)
