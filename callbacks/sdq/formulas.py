"""The formulas of SDQ's search (Huang et al., ICML 2022, arXiv 2206.04459); reconstructed, see docs/methods/sdq.md."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from research.quant.ste import straight_through

Choice = Literal["sample", "interpolate"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
Weighting = Literal["weighted", "expected", "none"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
LEAST = 1e-4
"""Least probability of either width."""


def logistic_noise(u: Tensor) -> Tensor:
    """``log(1 - u) - log u``: the difference of two Gumbel variables, from one uniform in (0, 1); elementwise."""
    return torch.log1p(-u) - torch.log(u)


def relaxed_coin(beta: Tensor, noise: Tensor, tau: float) -> Tensor:
    """``sigmoid((log beta - log(1 - beta) + noise) / tau)``: Gumbel-softmax of two outcomes (equations 4 and 5).

    Above 1/2 with probability ``beta`` whatever ``tau`` is; with noise from a uniform u exactly where ``u < beta``.

    Args:
        beta: probability of the higher width, any shape; kept in ``LEAST .. 1 - LEAST``.
        noise: ``G_0 - G_1``, the same shape.
        tau: temperature.
    """
    beta = torch.clamp(beta, LEAST, 1 - LEAST)
    return torch.sigmoid((torch.log(beta) - torch.log1p(-beta) + noise) / tau)


def share_of_higher(beta: Tensor, noise: Tensor, tau: float, choice: Choice) -> Tensor:
    """What part of the weight the higher width has: 0 or 1 with the gradient of `relaxed_coin` (``sample``), or
    ``beta`` (``interpolate``); shapes as there."""
    if choice == "interpolate":
        return torch.clamp(beta, LEAST, 1 - LEAST)
    soft = relaxed_coin(beta, noise, tau)
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def mixture(share: Tensor, higher: Tensor, lower: Tensor) -> Tensor:
    """``share * higher + (1 - share) * lower``: an expected value, or with a share of 0 or 1 exactly one of the two."""
    return share * higher + (1 - share) * lower


def error_weight(bits: Tensor, weights: int | Tensor) -> Tensor:
    """``a_b = b (2^b - 1)^2 / weights``, by which a quantization error becomes a size penalty (inferred).

    A rounding error that is uniform over steps of ``2 / (2^b - 1)`` has the variance ``(2^b - 1)^-2 / 3``: the sum of
    its squares over N weights, times ``a_b``, is ``b N / (3 weights)``.

    Args:
        bits: b, any shape.
        weights: number of all weights that are searched.
    """
    return bits * (torch.exp2(bits) - 1).square() / weights


def improbabilities(bits: list[int], beta: float, start: float) -> dict[int, float]:
    """``-log P`` of the widths that a search can end with, by width (inferred).

    The present width has the probability ``beta``, the next lower one ``1 - beta``, and each further step down the one
    that it starts with, ``1 - start``.

    Args:
        bits: candidates up to the present width, ascending; a single one is certain.
        beta: probability of the present width.
        start: probability with which a new pair of widths starts.
    """
    present, lower = bits[-1], bits[-2::-1]
    found = {width: -math.log1p(-beta) - steps * math.log1p(-start) for steps, width in enumerate(lower)}
    return {present: -math.log(beta) if lower else 0.0, **found}
