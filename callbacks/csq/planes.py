"""Bit planes: a weight as positive and negative binary digits that are relaxed to sigmoids (CSQ), the first the MSB.

All functions take the planes first: digits have shape (N, ...), gates (N,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HARDEST = 1e30
"""Greatest inverse temperature, within float32; a sigmoid is a step long before."""


def plane_weights(planes: int) -> Tensor:
    """``c_b = 2^(N-1-b) / (2^N - 1)``, which sum to 1; float64 of shape (N,)."""
    powers = torch.exp2(torch.arange(planes - 1, -1, -1, dtype=torch.float64))
    return powers / powers.sum()


def temperature(progress: float, beta_max: float) -> float:
    """Inverse temperature ``beta = beta_max^progress`` (official code).

    Args:
        progress: part of the search that is over; above 1 it goes on growing, up to ``HARDEST``.
        beta_max: value at 1, 1 or more; at 0 it is 1.
    """
    most = math.log(HARDEST) / math.log(beta_max) if beta_max > 1 else math.inf
    return float(beta_max ** min(progress, most))


def soft_weight(
    positive: Tensor, negative: Tensor, gates: Tensor, scale: Tensor, beta: Tensor, weights: Tensor
) -> Tensor:
    """``W = s sum_b c_b (h(p_b) - h(n_b)) g_b`` with ``h(t) = sigmoid(beta t)`` (official code); exact derivatives.

    Args:
        positive, negative: p and n, (N, ...).
        gates: g, the gates' values in [0, 1], (N,).
        scale: s, 0-dim.
        beta: 0-dim.
        weights: c, (N,).

    Returns:
        Weights, (...).
    """
    digits = torch.sigmoid(beta * positive) - torch.sigmoid(beta * negative)
    shares = (weights * gates).reshape(-1, *[1] * (positive.ndim - 1))
    weight: Tensor = scale * (shares * digits).sum(0)
    return weight


def hard_codes(positive: Tensor, negative: Tensor, opened: Tensor) -> Tensor:
    """``k = sum_b 2^(N-1-b) (1[p_b > 0] - 1[n_b > 0]) o_b``, int32 of shape (...), from -(2^N - 1) to 2^N - 1.

    The rule of the gates, applied to the digits as well: a reconstruction of the paper's exact weights.

    Args:
        positive, negative: p and n, (N, ...).
        opened: which planes count, boolean (N,).
    """
    planes = len(opened)
    powers = 2 ** torch.arange(planes - 1, -1, -1, dtype=torch.int32, device=positive.device) * opened
    digits = (positive > 0).to(torch.int32) - (negative > 0).to(torch.int32)
    return (powers.reshape(-1, *[1] * (positive.ndim - 1)) * digits).sum(0, dtype=torch.int32)


def split(w: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits of ``|w|`` in units of ``s / (2^N - 1)`` with ``s = max|w|``: positive, negative, s (official code).

    The digits, 0 or 1, have the shape (N, *w.shape): those of ``w > 0`` are in the first stack, all others in the
    second.
    """
    top = 2**planes - 1
    scale = torch.clamp(w.abs().amax(), min=torch.finfo(torch.float32).tiny)
    codes = torch.round(w.abs() / scale * top).to(torch.int64)
    shifts = torch.arange(planes - 1, -1, -1, device=w.device).reshape(-1, *[1] * w.ndim)
    digits = ((codes >> shifts) & 1).to(w.dtype)
    above = w > 0
    return digits * above, digits * ~above, scale


def prune(gates: Tensor, beta: float) -> Tensor:
    """``m <- min(beta m, 0)``: open gates are undecided again, closed ones as closed as they were (between rounds)."""
    return torch.clamp(beta * gates, max=0)


def spans(opened: Tensor) -> Tensor:
    """Planes from the first open one to the last, both included, of each layer: boolean (L, N) -> integers (L,)."""
    planes = opened.shape[1]
    flags = opened.to(torch.int32)
    behind_last = flags.flip(1).argmax(1)
    return torch.where(opened.any(1), planes - behind_last - flags.argmax(1), 0)


def width_of(span: int) -> int:
    """Bits of the codes of so many planes, sign included; 0 for none: they lie in ``+-(2^span - 1)``."""
    return span + 1 if span else 0


def span_of(opened: Sequence[bool]) -> int:
    """`spans` of one layer."""
    return int(spans(torch.tensor([list(opened)]))[0])
