"""The probabilities of grid points under logistic noise: how Relaxed Quantization makes rounding differentiable.

RQ: Louizos, Reisser, Blankevoort, Gavves, Welling, "Relaxed Quantization for Discretized Neural Networks", ICLR 2019,
arXiv 1810.01875. A value ``x`` with noise ``eps ~ Logistic(0, sigma)`` falls into the bin of the grid point ``i`` with
the probability ``pi_i = (c(g_i + alpha/2) - c(g_i - alpha/2) + f) / sum_j (...)``, ``c(r) = sigmoid((r - x) / sigma)``,
``g_i = alpha i`` for the codes ``i`` of the grid, ``f`` a small constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
REACH = 6.0
"""How many sigma beyond the last bin a value is still told from others."""


class Noise(NamedTuple):
    """A grid's step and the noise in front of it.

    Attributes:
        scale: alpha, positive, broadcastable against the values.
        sigma: of the logistic noise, positive, likewise.
        fuzz: f, what every bin has on top.
    """

    scale: Tensor
    sigma: Tensor
    fuzz: float


def grid_mass(x: Tensor, low: Tensor, high: Tensor, count: Tensor | int, noise: Noise) -> Tensor:
    """Probability that ``x + eps`` falls into one of the bins from ``low`` to ``high``, plus ``count * fuzz``.

    ``c(b) - c(a) = sigmoid((b - x)/sigma) sigmoid((x - a)/sigma) (1 - exp((a - b)/sigma))``: no difference of numbers
    that are nearly equal, far from the grid neither. Two sigmoids an element, differentiable any number of times.

    Args:
        x: values, any shape.
        low, high: first and last code, broadcastable against ``x``.
        count: ``high - low + 1``.
        noise: of the grid.
    """
    scale, sigma, fuzz = noise
    inside = torch.sigmoid(((high + 0.5) * scale - x) / sigma) * torch.sigmoid((x - (low - 0.5) * scale) / sigma)
    return torch.add(inside * -torch.expm1(-count * scale / sigma), count, alpha=fuzz)


def within_reach(x: Tensor, low: Tensor, high: Tensor, noise: Noise) -> Tensor:
    """``x``, held at `REACH` sigma beyond the bins of ``low`` and ``high``, where its derivative ends (inferred).

    By then the last grid point has nearly all the probability that the truncated noise can give it. Much farther out
    all masses would be the fuzz alone, and all points equally probable. Shapes as `grid_mass`.
    """
    least, most = ((low - 0.5) * noise.scale, (high + 0.5) * noise.scale)
    return torch.clamp(x, min=least - REACH * noise.sigma, max=most + REACH * noise.sigma)


def stochastic_mass(x: Tensor, points: Tensor, noise: Noise) -> Tensor:
    """`grid_mass` of single points with noise ``U(-alpha/2, alpha/2)`` instead: ``max(0, 1 - |i - x/alpha|) + fuzz``.

    These are the probabilities of stochastic rounding (RQ, section 2.2): the upper neighbour of ``x/alpha`` has its
    distance to the lower one. Shapes as there; ``x`` inside the grid.
    """
    return torch.relu(1 - (points - x / noise.scale).abs()) + noise.fuzz


def window(codes: Tensor, low: Tensor, high: Tensor, size: int) -> list[Tensor]:
    """``size`` neighbouring codes around ``codes``, ascending, each of their shape; all of a grid of ``size`` or less.

    RQ's local grid, with a fixed number of points. Where the grid has fewer, the last ones are above ``high``. They
    are no further axis: what is computed of them is elementwise, which a compiler makes one loop of.
    """
    start = torch.clamp(codes - size // 2, min=low, max=torch.maximum(high + 1 - size, low))
    return [start + i for i in range(size)]


def mean_code(points: Iterable[Tensor], masses: Iterable[Tensor]) -> Tensor:
    """``sum_i m_i i / sum_i m_i`` of codes and their masses, one tensor for each i."""
    moment = total = torch.zeros(())
    for point, mass in zip(points, masses, strict=True):
        moment, total = moment + mass * point, total + mass
    return moment / total


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``, from the default generator."""
    return -torch.log(-torch.log(torch.clamp(torch.rand_like(like), min=TINY)))


def relaxed_choice(log_masses: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """``softmax((log pi + gumbel) / temperature)`` over the last axis (RQ, equation 8): Gumbel-softmax.

    Args:
        log_masses: ``log pi`` up to a constant, (..., points); ``-inf`` for what is not on the grid.
        gumbel: noise of the same shape.
        temperature: lambda; towards 0 the choice becomes one-hot.
    """
    return torch.softmax((log_masses + gumbel) / temperature, dim=-1)
