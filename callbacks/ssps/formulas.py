"""The formulas of SSPS's search (Sun, Jiao, Ren, Li, Shang, Liu, arXiv 2103.02904); reconstructed, see
docs/methods/ssps.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Certainty = Literal["max", "margin", "entropy"]
CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)


def gumbel(u: Tensor) -> Tensor:
    """``-log(-log u)``: a standard Gumbel variable from a uniform one in (0, 1), elementwise."""
    return -torch.log(-torch.log(u))


def relaxed_pick(alpha: Tensor, noise: Tensor, tau: Tensor | float) -> Tensor:
    """``softmax((log p + noise) / tau)`` with ``p = softmax(alpha)``, both over the last axis: Gumbel-softmax.

    With Gumbel noise the greatest is candidate i with probability ``p_i``, whatever ``tau`` is.

    Args:
        alpha: logits, (..., n).
        noise: the same shape.
        tau: temperature, 0-dim.
    """
    return torch.softmax((torch.log_softmax(alpha, -1) + noise) / tau, -1)


def carried(value: Tensor, shares: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """``value``, from which ``shares`` gets a gradient: that of ``sum_i shares_i branches_i`` with constant branches.

    Straight through the pick: ``dL/dshares_i = <dL/dvalue, branches_i>``, and no other derivative changes.

    Args:
        value: output of the picked branch, any shape.
        shares: (k,).
        branches: outputs of k candidates, each in the shape of ``value``.
    """
    nothing = shares - shares.detach()
    for share, branch in zip(nothing, branches, strict=True):
        value = value + share * branch.detach()
    return value


def entropy(p: Sequence[float]) -> float:
    """``H(p) = -sum_i p_i log p_i`` in nats."""
    return -sum(value * math.log(value) for value in p if value > 0)


def certainty(p: Sequence[float], measure: Certainty) -> float:
    """How far a choice is made, 0 to 1: the greatest probability, its lead over the next, or ``1 - H(p) / log n``.

    Args:
        p: probabilities of n candidates, two or more.
        measure: ``max``, ``margin`` or ``entropy``.
    """
    if measure == "entropy":
        return 1 - entropy(p) / math.log(len(p))
    second, first = sorted(p)[-2:]
    return first if measure == "max" else first - second


def most_certain_first(certainties: Mapping[str, float]) -> list[str]:
    """Names by falling certainty; of equal ones the first comes first."""
    return sorted(certainties, key=lambda name: -certainties[name])


def excess_penalty(ratios: Tensor, two_sided: bool) -> Tensor:
    """``sum_k max(r_k - 1, 0)^2``, two-sided ``sum_k (r_k - 1)^2``, 0-dim.

    Args:
        ratios: expected cost by budget, as a part of it, (budgets,).
        two_sided: costs below their budgets count too.
    """
    excess = ratios - 1
    return (excess if two_sided else torch.relu(excess)).square().sum()


def cells_due(step: int, warm: int, end: int, rounds: int, cells: int) -> int:
    """How many cells are fixed in front of ``step``: after round r of R ``ceil(r cells / R)``, at the end all.

    Args:
        step: optimizer step, counted from 0.
        warm, end: steps in front of which the warm-up and the search end, ``warm < end``.
        rounds: R, parts of equal length of the steps between.
        cells: number of cells.
    """
    over = min(max(rounds * (step - warm) // (end - warm), 0), rounds)
    return -(-over * cells // rounds)
