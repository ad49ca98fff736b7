"""The formulas of constrained quantization (Hounie, Elenter, Ribeiro, arXiv 2210.15623; ihounie/con-qat)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["squared", "absolute"]


def rounded_unit(t: Tensor, bits: Tensor) -> Tensor:
    """``round(n clip(t, 0, 1)) / n`` with ``n = 2^bits - 1``; shape of ``t``, ``bits`` 0-dim."""
    n = torch.clamp(2**bits - 1, min=1)
    return torch.round(torch.clamp(t, 0, 1) * n) / n


def proximity(high: Tensor, low: Tensor, bits: Tensor | None, distance: Distance = "squared") -> Tensor:
    """``d_l``: mean over elements of the distance of a layer's two outputs on one input; 0-dim (official code).

    Args:
        high: outputs with high-precision weights, any shape.
        low: outputs with low-precision weights, the same shape; no gradient flows into them.
        bits: clip both to [0, 1] and round the low ones to so many bits; None: compare them as they are.
        distance: ``squared`` or ``absolute``.
    """
    high, low = _wide(high), _wide(low.detach())
    if bits is not None:
        high, low = torch.clamp(high, 0, 1), rounded_unit(low, bits)
    return (high - low).square().mean() if distance == "squared" else (high - low).abs().mean()


def output_distance(low: Tensor, high: Tensor) -> Tensor:
    """``- sum_c softmax(high)_c log softmax(low)_c``, batch mean; the gradient flows into both (official code).

    Args:
        low, high: logits (N, classes) of the low- and of the high-precision network.
    """
    return -(F.softmax(high, dim=1) * F.log_softmax(low, dim=1)).sum(dim=1).mean()


def dual_ascent(duals: Tensor, slacks: Tensor, lr: float) -> Tensor:
    """``relu(lambda + lr s)``, elementwise: a multiplier grows while the slack ``s = d - eps`` is above 0."""
    return torch.relu(duals + lr * slacks)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
