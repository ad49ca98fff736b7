"""The formulas of DropBits (Lee, Yun, Hwang, Yang, arXiv 1911.12990); reconstructed, see docs/methods/srq.md.

A grid of b bits has b levels: level k holds the points of the grid of k bits that the grid of k - 1 bits has not. All
have the same step. The hard concrete distribution: Louizos, Welling, Kingma, ICLR 2018, arXiv 1712.01312.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from research.quant.relaxed_grid import Noise, grid_mass

TAU, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and ends of the stretched interval of the hard concrete distribution."""


def hard_concrete(log_a: Tensor, u: Tensor) -> Tensor:
    """``Z = clip(S (zeta - gamma) + gamma, 0, 1)``, ``S = sigmoid((log u - log(1 - u) + log_a) / tau)``; elementwise.

    Args:
        log_a: location, any shape.
        u: uniform in (0, 1), the same shape.
    """
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_a) / TAU)
    return torch.clamp(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def nonzero_logit(log_a: Tensor) -> Tensor:
    """``log_a - tau log(-gamma / zeta)``, whose sigmoid is ``P(Z != 0)``; elementwise."""
    return log_a - TAU * math.log(-GAMMA / ZETA)


def nested(z: Tensor) -> Tensor:
    """``M_1 = 1, M_k = Z_2 ... Z_k``, (b,), of the levels' own masks ``Z_2 .. Z_b``, (b - 1,)."""
    masks = [torch.ones_like(z[0])]
    for each in z.unbind():
        masks.append(masks[-1] * each)
    return torch.stack(masks)


class Levels(NamedTuple):
    """The levels of a grid, each tensor (b,).

    Attributes:
        low, high: least and greatest code of the grids of 1 to b bits.
        masks: M, from 1 on not growing.
    """

    low: Tensor
    high: Tensor
    masks: Tensor

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Least and greatest code of the grid that is left: of the highest level whose mask is not 0; 0-dim."""
        left = self.masks > 0
        return (self.low * left).amin(), (self.high * left).amax()

    @property
    def shares(self) -> Tensor:
        """``M_k - M_(k+1)``, with which a sum over levels becomes one over whole grids."""
        return self.masks - torch.cat([self.masks[1:], torch.zeros_like(self.masks[:1])])


def mask_of(codes: Tensor, levels: Levels) -> Tensor:
    """``M`` of the level of each code, of the shape of ``codes``."""
    total = torch.zeros_like(codes)
    for low, high, share in zip(levels.low.unbind(), levels.high.unbind(), levels.shares.unbind(), strict=True):
        total = total + share * ((codes >= low) & (codes <= high))
    return total


def masked_mass(x: Tensor, levels: Levels, noise: Noise) -> Tensor:
    """``sum_i M_level(i) m_i`` over all grid points, with ``m`` of `grid_mass`: two sigmoids a level and element."""
    total = torch.zeros_like(x)
    for low, high, share in zip(levels.low.unbind(), levels.high.unbind(), levels.shares.unbind(), strict=True):
        total = total + share * grid_mass(x, low, high, high - low + 1, noise)
    return total


@torch.no_grad()
def most_probable(x: Tensor, levels: Levels, noise: Noise) -> Tensor:
    """The code of greatest ``M_level(i) pi_i``, of the shape of ``x``, without gradient; of equals the nearer.

    As masks do not grow with the level, it is among the nearest codes of the b grids.
    """
    nearest = torch.round(x / noise.scale)
    codes, best = torch.zeros_like(x), torch.full_like(x, -1.0)
    for low, high, mask in reversed(list(zip(*(each.unbind() for each in levels), strict=True))):
        candidates = torch.clamp(nearest, low, high)
        score = mask * grid_mass(x, candidates, candidates, 1, noise)
        codes, best = torch.where(score > best, candidates, codes), torch.maximum(score, best)
    return codes


def odds_against(nonzero: Tensor, present: int) -> list[float]:
    """``sum_(k < j <= present) log(P(Z_j != 0) / P(Z_j = 0))`` for widths k of 1 .. present: the log-odds of the levels
    that go with the bits above k; 0 at the present width (inferred).

    Args:
        nonzero: `nonzero_logit` of the levels 2 .. b, (b - 1,).
        present: `kept_bits` of them, so that no term is negative.
    """
    logits = nonzero[: present - 1].double()
    return [*logits.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def kept_bits(nonzero: Sequence[float]) -> int:
    """The highest level such that it and all below have ``P(Z != 0) > 0.5``, from the logits of the levels 2 .. b."""
    return next((level for level, logit in enumerate(nonzero, start=1) if logit <= 0), len(nonzero) + 1)
