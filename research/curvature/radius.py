"""Sharpness at a finite radius: how far the true loss rises in a ball around a network, at worst and on average.

Surface: ``perturbation``, see `research.curvature.displacement`. A ball of radius ``rho`` holds the displacements
``T d``, with a diagonal ``T`` that measures what counts as far:

==========  =============================  ===============================================================
norm        T                              ball
==========  =============================  ===============================================================
plain       1                              ``||d|| <= rho`` over all tensors together
relative    ``||w||`` of all together      ``||d|| <= rho``: ``rho`` is a share of the network's norm
adaptive    ``|w| + eta``, 1 for vectors   ``||d|| <= rho`` (ASAM, arXiv 2102.11600, element-wise)
filter      ``||w_f||`` of its filter      ``||d_f|| <= rho`` for every filter f (Li et al., arXiv 1712.09913)
==========  =============================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from research.curvature.displacement import (
    Named,
    Site,
    centre,
    gradient_at,
    loss_at,
    random_direction,
)
from research.curvature.progress import progress
from research.curvature.sharpness import Loss, Sharpness
from research.curvature.surface import WEIGHTS
from research.learning.perturbation import EPS, joint_norm
from research.quant.kinds import Kind

Norm = Literal["plain", "relative", "adaptive", "filter"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def filter_norms(tensor: Tensor) -> Tensor:
    """Norm of each filter of a weight (C, ...), shape (C, 1, ...); a vector counts as one filter, shape (1,)."""
    axes = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else (0,)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return norms


@dataclass(frozen=True)
class Ball:
    """The displacements ``{T d}``, see the module's table.

    Attributes:
        factors: T by parameter name; broadcasts against the tensor.
        per_filter: every filter has a radius of its own.
    """

    factors: Named
    per_filter: bool

    @classmethod
    def around(cls, points: Named, norm: Norm, eta: float = 0.01) -> Ball:
        """The ball around ``points``; ``eta`` keeps the adaptive ``T`` off zero.

        Raises:
            ValueError: an unknown norm.
        """
        if norm not in NORMS:
            raise ValueError(f"norm={norm}: use one of {', '.join(NORMS)}")
        whole = joint_norm(points)
        rules = {
            "plain": lambda w: torch.ones_like(w),
            "relative": lambda w: whole.to(w.dtype).expand_as(w),
            "adaptive": lambda w: w.abs() + eta if w.ndim > 1 else torch.ones_like(w),
            "filter": filter_norms,
        }
        return cls({name: rules[norm](point) for name, point in points.items()}, norm == "filter")

    def lengths(self, d: Named) -> dict[str, Tensor]:
        """Norms of ``d`` by name, broadcasting against it: of each filter, or the joint one for all."""
        if self.per_filter:
            return {name: filter_norms(tensor) for name, tensor in d.items()}
        return dict.fromkeys(d, joint_norm(d))

    def unit(self, d: Named) -> dict[str, Tensor]:
        """``d`` at length 1; zeros stay zero."""
        lengths = self.lengths(d)
        return {name: tensor / (lengths[name] + EPS).to(tensor.dtype) for name, tensor in d.items()}

    def inside(self, d: Named, rho: float) -> dict[str, Tensor]:
        """The point of the ball of radius ``rho`` nearest to ``d``."""
        lengths = self.lengths(d)
        return {
            name: tensor * torch.clamp(rho / (lengths[name] + EPS), max=1).to(tensor.dtype)
            for name, tensor in d.items()
        }

    def moves(self, d: Named, length: float = 1.0) -> dict[str, Tensor]:
        """``length * T d``, in the units of the tensors."""
        return {name: length * self.factors[name] * tensor for name, tensor in d.items()}


@dataclass(frozen=True)
class AverageSharpness:
    """The loss at random points of a ball's boundary.

    Attributes:
        clean: mean loss of the network.
        losses: mean loss at each random point.
    """

    clean: float
    losses: tuple[float, ...]

    @property
    def rise(self) -> float:
        """The sharpness: mean of the losses less ``clean``."""
        return mean(self.losses) - self.clean

    @property
    def standard_error(self) -> float:
        """Standard error of `rise` over the points."""
        return float(stdev(self.losses) / len(self.losses) ** 0.5)

    @property
    def worst(self) -> float:
        """Greatest rise among the points."""
        return max(self.losses) - self.clean


def worst_case(
    net: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    rho: float,
    norm: Norm = "plain",
    steps: int = 10,
    site: Site = "quantized",
    kinds: Collection[Kind] = WEIGHTS,
    eta: float = 0.01,
) -> Sharpness:
    """The greatest loss found in the ball by projected gradient ascent: a lower bound of the greatest there is.

    ``d <- P(d + rho/2 u(T g))`` from ``d = 0``, with ``g`` the gradient of the mean loss over all batches at
    ``w + T d``, ``u`` to length 1 and ``P`` back into the ball. A single step has length ``rho``: it is the point of
    SAM (ASAM for ``adaptive``), whose loss is given whether or not it lies above the clean one. ``net`` is left as it
    was.

    Args:
        net: a converted network.
        loss: ``loss(network, batch)``, a mean over the batch.
        batches: ``(inputs, targets)`` each.
        rho: radius, in the units of ``norm``.
        norm: what counts as far.
        steps: gradients taken.
        site: where weights are displaced.
        kinds: which parameters are displaced.
        eta: offset of the adaptive norm.

    Returns:
        ``clean`` and ``perturbed`` loss; ``gradient_norm`` is that of ``T g`` at ``w``, all tensors together.

    Raises:
        ValueError: no batches, or an option out of its range.
    """
    _check(rho=(rho, 0), steps=(steps, 1))
    points = centre(net, site, kinds)
    ball = Ball.around(points, norm, eta)
    d = {name: torch.zeros_like(point) for name, point in points.items()}
    losses: list[float] = []
    gradient_norm = 0.0
    for step in progress(range(steps), f"worst case at rho={rho:g}"):
        value, gradients = gradient_at(net, loss, batches, site, ball.moves(d))
        scaled = ball.moves(gradients)
        if step == 0:
            gradient_norm = float(joint_norm(scaled))
        losses.append(value)
        ascent = ball.unit(scaled)
        d = ball.inside({name: d[name] + rho / min(steps, 2) * ascent[name] for name in d}, rho)
    last = loss_at(net, loss, batches, site, ball.moves(d))
    return Sharpness(losses[0], last if steps == 1 else max(*losses, last), gradient_norm)


def average_case(
    net: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    rho: float,
    norm: Norm = "plain",
    directions: int = 10,
    seed: int = 0,
    site: Site = "quantized",
    kinds: Collection[Kind] = WEIGHTS,
    eta: float = 0.01,
) -> AverageSharpness:
    """The loss at ``w + rho T u`` for Gaussian directions ``u`` of length 1. ``net`` is left as it was.

    The directions depend on ``seed`` and the shapes alone: they are the same for every radius and network.

    Args:
        net: a converted network.
        loss: ``loss(network, batch)``, a mean over the batch.
        batches: ``(inputs, targets)`` each.
        rho: radius, in the units of ``norm``.
        norm: what counts as far.
        directions: how many points.
        seed: of the directions.
        site: where weights are displaced.
        kinds: which parameters are displaced.
        eta: offset of the adaptive norm.

    Raises:
        ValueError: no batches, or an option out of its range.
    """
    _check(rho=(rho, 0), directions=(directions, 2))
    points = centre(net, site, kinds)
    ball = Ball.around(points, norm, eta)
    clean = loss_at(net, loss, batches, site, {})
    losses = [
        loss_at(net, loss, batches, site, ball.moves(ball.unit(random_direction(points, seed, index)), rho))
        for index in progress(range(directions), f"random directions at rho={rho:g}")
    ]
    return AverageSharpness(clean, tuple(losses))


def _check(**options: tuple[float, float]) -> None:
    for key, (value, least) in options.items():
        if value < least:
            raise ValueError(f"{key}={value:g}: use {least:g} or more")
