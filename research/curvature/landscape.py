"""Slices of the loss around a network, along filter-normalised random directions (Li et al., NeurIPS 2018,
arXiv 1712.09913).

Surface: ``perturbation``, see `research.curvature.displacement`. Each filter of a direction has the norm of the filter
that it displaces, so that slices of networks with weights of other sizes can be compared; position 1 moves every filter
by its own norm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from research.curvature.displacement import Named, Site, centre, loss_at, random_direction
from research.curvature.progress import progress
from research.curvature.radius import Ball
from research.curvature.sharpness import Loss
from research.curvature.surface import WEIGHTS
from research.quant.kinds import Kind

DIMENSIONS = (1, 2)


def filter_normalised(direction: Named, points: Named) -> dict[str, Tensor]:
    """``direction`` with each filter at the norm of the same filter of ``points``; a vector counts as one filter.

    Args:
        direction: tensors by parameter name, weights (C, ...).
        points: what they displace, by the same names and in the same shapes; a filter of zeros is not displaced.
    """
    ball = Ball.around(points, "filter")
    return ball.moves(ball.unit(direction))


def filter_normalised_directions(
    net: nn.Module, dimensions: int, seed: int = 0, site: Site = "quantized", kinds: Collection[Kind] = WEIGHTS
) -> list[dict[str, Tensor]]:
    """Random directions for `landscape`, before normalisation the same for every network of these shapes.

    Biases and norm parameters are displaced only where ``kinds`` names them.

    Raises:
        ValueError: ``dimensions`` is not 1 or 2.
    """
    if dimensions not in DIMENSIONS:
        raise ValueError(f"dimensions={dimensions}: use 1 or 2")
    points = centre(net, site, kinds)
    return [filter_normalised(random_direction(points, seed, index), points) for index in range(dimensions)]


def positions(span: float, points: int) -> list[float]:
    """``points`` equally spaced positions from ``-span`` to ``span``; the middle one is 0 exactly.

    Raises:
        ValueError: a span that is not positive, or an even or too small number.
    """
    if span <= 0:
        raise ValueError(f"span={span:g}: use a positive number, such as 1")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points={points}: use an odd number from 3, such as 21, so that the network itself is one")
    half = points // 2
    return [span * (index - half) / half for index in range(points)]


def landscape(
    net: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    directions: Sequence[Named],
    along: Sequence[float],
    site: Site = "quantized",
) -> Tensor:
    """Mean loss at ``w + sum_i x_i direction_i``, for all combinations of positions. ``net`` is left as it was.

    Args:
        net: a converted network.
        loss: ``loss(network, batch)``, a mean over the batch.
        batches: ``(inputs, targets)`` each.
        directions: one axis each.
        along: positions on every axis, in units of the directions.
        site: where weights are displaced; that of the directions.

    Returns:
        float64 (positions, ...), one axis for each direction, in their order.
    """
    losses = [
        loss_at(net, loss, batches, site, _combined(directions, place))
        for place in progress(list(product(along, repeat=len(directions))), "landscape")
    ]
    return torch.tensor(losses, dtype=torch.float64).reshape((len(along),) * len(directions))


def _combined(directions: Sequence[Named], place: Sequence[float]) -> dict[str, Tensor]:
    return {
        name: torch.stack([x * direction[name] for x, direction in zip(place, directions, strict=True)]).sum(0)
        for name in directions[0]
    }
