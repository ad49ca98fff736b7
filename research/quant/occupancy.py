"""Occupancy of the codes: how a tensor's elements are spread over the codes of its quantizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from research.quant.quantizers.base import Quantizer


@dataclass(frozen=True)
class Occupancy:
    """One tensor on one grid.

    Attributes:
        shares: share of the elements at each code of the grid, in ascending order of the codes; 0 at an empty one.
        clipped: share of the elements outside the range, see `clipped_share`.
    """

    shares: dict[int, float]
    clipped: float

    @property
    def entropy(self) -> float:
        """``-sum p log2 p`` over the codes, in bits."""
        return -sum(share * math.log2(share) for share in self.shares.values() if share > 0)

    @property
    def entropy_ratio(self) -> float:
        """The entropy as a part of ``log2(number of codes)``, that of even shares; 0 where there is but one code."""
        return self.entropy / math.log2(len(self.shares)) if len(self.shares) > 1 else 0.0


@torch.no_grad()
def code_shares(codes: Tensor, qmin: int, qmax: int, step: int = 1) -> dict[int, float]:
    """Share of the elements of ``codes`` (any shape, integers) at each of ``qmin, qmin + step, ..., qmax``."""
    found, counts = torch.unique(codes, return_counts=True)
    shares = dict.fromkeys(range(qmin, qmax + 1, step), 0.0)
    shares |= {int(code): int(count) / codes.numel() for code, count in zip(found, counts, strict=True)}
    return dict(sorted(shares.items()))


@torch.no_grad()
def clipped_share(quantizer: Quantizer, x: Tensor) -> float:
    """Share of the elements whose value behind ``quantizer`` does not move with ``x``, rounding apart: clipped ones.

    By the derivative of the quantizer's own surrogate, so that every quantizer counts by its own rule: for LSQ outside
    ``[s qmin, s qmax]``, never for DoReFa's weights, which are normalised and not clipped.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    # unequal tangents: elements that are standardised together would not move by a common one
    tangents = torch.linspace(1, 2, wide.numel(), dtype=wide.dtype, device=wide.device).view_as(wide)
    moves: Tensor = jvp(lambda values: quantizer.fake_quantize(values, rounding=False), (wide,), (tangents,))[1]
    return int((moves == 0).sum()) / x.numel()


def occupancy(quantizer: Quantizer, x: Tensor, codes: Tensor) -> Occupancy:
    """How the elements of ``x``, whose codes are ``codes``, are spread.

    Args:
        quantizer: of ``x``, in evaluation mode.
        x: what is quantized, any shape.
        codes: of the same shape; given, because they need not be the quantizer's own (frozen codes).
    """
    qmin, qmax = (int(limit) for limit in (quantizer.limits()[0].min(), quantizer.limits()[1].max()))
    step = 2 if quantizer.grid.kind == "midrise" else 1
    return Occupancy(code_shares(codes, qmin, qmax, step), clipped_share(quantizer, x))
