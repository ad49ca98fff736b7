"""Oscillation of codes: how often a weight's code jumps back to where it came from.

Nagel, Fournarakis, Bondarenko, Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv 2203.11086, the section on tracking; Qualcomm-AI-research/oscillations-qat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Oscillation(NamedTuple):
    """What is known of each code after some steps; all tensors have the shape of the weight.

    Attributes:
        codes: the codes of now.
        direction: sign of the last change, 0 before the first.
        frequency: exponential average of oscillations a step, 0 to 1.
        oscillations: number of oscillations so far.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    oscillations: Tensor


def start(codes: Tensor, dtype: torch.dtype = torch.float32) -> Oscillation:
    """The state at the first look at ``codes``: nothing has changed yet; ``dtype`` is the frequency's."""
    zeros = torch.zeros_like(codes)
    return Oscillation(codes, zeros, zeros.to(dtype), zeros)


def track(before: Oscillation, codes: Tensor, momentum: float) -> Oscillation:
    """One more look: ``codes`` after a further step.

    A change against the direction of the change before it is an oscillation, ``o = 1``; the first change never is.
    ``f_t = m o_t + (1 - m) f_(t-1)`` with ``f_0 = 0``.

    Args:
        before: the state so far.
        codes: codes of now.
        momentum: m, weight of the present step; the average reaches back about ``1 / m`` steps.
    """
    change = torch.sign(codes - before.codes)
    switched = change != 0
    oscillated = switched & (change == -before.direction)
    return Oscillation(
        codes=codes,
        direction=torch.where(switched, change, before.direction),
        frequency=momentum * oscillated.to(before.frequency.dtype) + (1 - momentum) * before.frequency,
        oscillations=before.oscillations + oscillated,
    )
