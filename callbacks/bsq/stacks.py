"""Bit stacks: a weight as real-valued positive and negative binary digits whose sum is rounded (BSQ).

The unit is that of the least significant plane: a layer with n planes has codes from ``-(2^n - 1)`` to ``2^n - 1``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from callbacks.csq.planes import spans
from research.quant.ste import straight_through

EPS = 1e-8


class Requantized(NamedTuple):
    """A weight on the least grid that holds it.

    Attributes:
        codes: int32, any shape.
        step: distance of neighbouring values, 0-dim.
        planes: n, 0-dim integer.
    """

    codes: Tensor
    step: Tensor
    planes: Tensor


def rounded(units: Tensor, top: Tensor) -> Tensor:
    """``round(clamp(u, -top, top))`` with the identity as its derivative, also where it is clamped (official code)."""
    return straight_through(torch.round(torch.clamp(units, -top, top)), units)


def plane_digits(codes: Tensor, planes: int) -> Tensor:
    """Binary digits of ``|codes|``, the most significant first: integers (N, *codes.shape)."""
    shifts = torch.arange(planes - 1, -1, -1, device=codes.device).reshape(-1, *[1] * codes.ndim)
    return (codes.abs() >> shifts) & 1


def requantized(units: Tensor, step: Tensor, planes: Tensor, most: int) -> Requantized:
    """Round the sum of the planes, let the layer grow by one plane if it has outgrown them, and drop its empty ones.

    An empty plane has no 1 among the positive nor the negative digits. Dropping the last ones doubles the step; no
    value changes, except those that are clipped because the layer has ``most`` planes already (official code).

    Args:
        units: weights in units of ``step``, not clamped, any shape.
        step: 0-dim.
        planes: n, 0-dim integer.
        most: greatest n.
    """
    top = 2**planes - 1
    codes = torch.round(units).to(torch.int32)
    grown = (codes.abs().amax() > top) & (planes < most)
    top = torch.where(grown, 2 * top + 1, top)
    codes = torch.clamp(codes, -top, top).to(torch.int32)
    used = plane_digits(codes, most).flatten(1).any(1)
    behind = used.flip(0).to(torch.int32).argmax()
    return Requantized(codes >> behind.to(torch.int32), step * torch.exp2(behind), spans(used[None])[0].clamp(min=1))


def halved(codes: Tensor, planes: Tensor) -> Tensor:
    """Codes without the least significant plane: ``round(k / 2)``, clipped to the n - 1 planes left; int32."""
    top = 2 ** (planes - 1) - 1
    return torch.clamp(torch.round(codes / 2), -top, top).to(torch.int32)


def group_lasso(positive: Tensor, negative: Tensor, live: Tensor) -> Tensor:
    """``sum_b sqrt(1e-8 + sum(p_b^2 + n_b^2))`` over the live planes, 0-dim (official code).

    Args:
        positive, negative: p and n, (N, elements).
        live: 1 for a live plane, else 0, (N,).
    """
    energies = (positive.square() + negative.square()).flatten(1).sum(1)
    return (live * torch.sqrt(EPS + energies)).sum()
