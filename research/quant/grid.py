"""Grids: the sets of values that a quantized tensor can take, and the map from codes to values.

Four kinds cover everything the house deploys:

========  =========================================  ==========================================
kind      codes                                      value of a code ``q``
========  =========================================  ==========================================
uniform   integers in ``[qmin, qmax]``               ``(q - zero_point) * scale``
midrise   odd integers in ``[-(2^b - 1), 2^b - 1]``  ``q * scale`` (no level at zero)
codebook  indices in ``[0, 2^b - 1]``                ``codebook[q]``
log       integers, 0 reserved for the value zero    ``sign(q) * 2^((|q| - 1 + zero_point) * scale)``
========  =========================================  ==========================================

Mid-rise codes are stored doubled (``2q + 1`` of the usual half-integer levels), so that they are integers and the
zero point is 0; a deployed runtime needs no other arithmetic than for a uniform grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GridKind = Literal["uniform", "midrise", "codebook", "log"]
KINDS: tuple[GridKind, ...] = ("uniform", "midrise", "codebook", "log")


@dataclass(frozen=True)
class Grid:
    """What a quantizer's codes mean.

    Args:
        kind: how codes become values, see the module's table.
        signed: whether codes may be negative.
        narrow: leave out the most negative code of a signed uniform grid (``-2^(b-1)``), so that it is symmetric.

    Raises:
        ValueError: unknown kind, or a narrow grid without negative codes.
    """

    kind: GridKind = "uniform"
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grid kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if self.narrow and not self.signed:
            raise ValueError("narrow=true needs a signed grid: an unsigned grid has no negative code to leave out")

    def limits(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """``(qmin, qmax)``: the least and the greatest code at ``bits`` (any shape, 0 allowed: the only code is 0)."""
        if self.kind == "uniform":
            return code_limits(bits, torch.tensor(self.signed, device=bits.device), self.narrow)
        levels = torch.exp2(bits.float())
        if self.kind == "midrise":
            return 1 - levels, levels - 1
        if self.kind == "log" and self.signed:
            qmax = torch.clamp(levels / 2 - 1, min=0)
            return -qmax, qmax
        return torch.zeros_like(levels), levels - 1

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """De-quantized values of ``codes`` (any shape); differentiable in ``scale``, which broadcasts against them.

        For a codebook grid ``scale`` is the codebook: ``(2^b,)``, or, per channel, a scale's shape with ``2^b`` behind,
        such as ``(C, 1, 1, 1, 2^b)``.
        """
        if self.kind == "codebook":
            *shape, levels = scale.shape
            starts = levels * torch.arange(math.prod(shape), device=codes.device).reshape(shape)
            return scale.reshape(-1)[codes.long() + starts]
        codes = codes.to(scale.dtype)
        offset = torch.zeros((), dtype=scale.dtype, device=scale.device) if zero_point is None else zero_point
        if self.kind == "log":
            return torch.sign(codes) * torch.exp2((codes.abs() - 1 + offset) * scale)
        return codes * scale if zero_point is None else (codes - offset) * scale


def code_limits(bits: Tensor, signed: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Least and greatest code of a uniform grid, as float32 tensors.

    Signed: ``-2^(b-1) .. 2^(b-1) - 1`` (``narrow``: from ``-(2^(b-1) - 1)``); unsigned, narrow or not:
    ``0 .. 2^b - 1`` (Esser et al. 2020, LSQ, section 2). ``signed`` is a boolean tensor, since the sign of an
    activation is a fact of the data that calibration finds out. ``bits == 0`` gives ``(0, 0)``.
    """
    half = torch.where(signed, torch.floor(torch.exp2(bits.float() - 1)), torch.zeros((), device=bits.device))
    top = torch.where(signed, half, torch.exp2(bits.float())) - 1
    qmax = torch.clamp(top, min=0)
    qmin = torch.where((bits > 0) & signed, -qmax if narrow else -half, torch.zeros_like(half))
    return qmin, qmax
