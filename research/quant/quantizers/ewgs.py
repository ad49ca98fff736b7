"""EWGS: element-wise gradient scaling (Lee, Kim, Ham, CVPR 2021, arXiv 2104.00903; cvlab-yonsei/EWGS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ste import round_ste

Bounds = Literal["std", "mse"]


class EWGSRound(torch.autograd.Function):
    """Rounding whose derivative depends on the upstream gradient ``g``: ``g (1 + delta sign(g) (t - round(t)))``.

    The EWGS rule in units of codes: there ``delta`` is the paper's divided by the number of steps. Not a derivative
    of anything, so no curvature can be taken through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, delta: Tensor) -> Tensor:
        """``round(t)``, half to even."""
        return torch.round(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the residual and delta."""
        t, delta = inputs
        ctx.save_for_backward(t - output, delta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The scaled upstream gradient."""
        residual, delta = ctx.saved_tensors
        (gradient,) = gradients
        return gradient + delta * gradient.abs() * residual, None


def ewgs_round(t: Tensor, delta: Tensor) -> Tensor:
    """`EWGSRound` of ``t`` (any shape) with ``delta`` broadcastable against it; ``delta = 0`` is the plain STE."""
    rounded: Tensor = EWGSRound.apply(t, delta)  # type: ignore[no-untyped-call]
    return rounded


def starting_bounds(x: Tensor, n: Tensor, symmetric: bool, method: Bounds) -> tuple[Tensor, Tensor]:
    """``(lower, upper)`` for the data ``x``, any shape.

    ``std``: ``-+ 3 std`` if symmetric, else the minimum and ``3 std / sqrt(1 - 2 / pi)`` (official code). ``mse``: the
    lower bound is ``-upper`` or the minimum, and the width is the one of 100, up to that of the data, whose ``n + 1``
    evenly spaced values have the least squared error.
    """
    width = 3 * x.std() if symmetric else 3 * x.std() / math.sqrt(1 - 2 / math.pi)
    lower = -width if symmetric else x.amin()
    upper = width
    if method == "mse":
        best = torch.full_like(upper, torch.inf)
        for share in torch.linspace(0.01, 1, 100, device=x.device):
            low = -share * x.abs().amax() if symmetric else x.amin()
            high = -low if symmetric else low + share * (x.amax() - low)
            values = low + (high - low) * torch.round(torch.clamp((x - low) / (high - low), 0, 1) * n) / n
            error = (values - x).square().mean()
            lower, upper = torch.where(error < best, low, lower), torch.where(error < best, high, upper)
            best = torch.minimum(error, best)
    return lower, upper


class EWGS(Quantizer):
    """Discretisation of ``u = clip((x - lower) / (upper - lower), 0, 1)`` with a gradient-dependent derivative.

    Inputs: ``x_hat = round(u n) / n`` with ``n = 2^b - 1``; weights: ``2 (round(u n) / n - 1/2)``, a mid-rise grid.
    Both live on a fixed scale, 1 / n: conversion gives the layer an `OutputScale`, a trainable scalar on its output.
    The bounds are trained by plain autograd and not decayed. ``spec.init`` plays no role, ``bounds`` does.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        delta: strength of the gradient scaling; 0 is the plain straight-through estimator. The paper measures it anew
            every few epochs: ``callbacks=[ewgs]``.
        bounds: where they start: ``std`` (three standard deviations, the official code's) or ``mse`` (least squared
            error of the tensor, for short budgets).

    Attributes:
        delta: 0-dim buffer.
    """

    backward = "gradient_dependent"
    channelwise = False
    output_scale = True
    parameter_options = {"lower": {"weight_decay": 0.0}, "upper": {"weight_decay": 0.0}}
    delta: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        delta: float = 0.0,
        bounds: Bounds = "std",
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if spec.signed not in ("auto", role == "weight") or spec.narrow:
            raise ValueError(
                f"quantizer.{role}: ewgs has mid-rise weights and unsigned inputs, use signed=auto, narrow=false"
            )
        if delta < 0:
            raise ValueError(f"quantizer.{role}.options.delta={delta}: use 0 (plain estimator) or more, such as 0.01")
        if bounds not in ("std", "mse"):
            raise ValueError(f"quantizer.{role}.options.bounds={bounds}: use std or mse")
        self.bounds = bounds
        self.midrise = role == "weight"
        self.lower = nn.Parameter(torch.tensor(-1.0 if self.midrise else 0.0))
        self.upper = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("delta", torch.tensor(float(delta)))

    @property
    def scale(self) -> Tensor:
        """``1 / n``; no gradient."""
        return torch.ones_like(self.lower) / torch.clamp(self.limits()[1], min=1)

    def transform(self, x: Tensor) -> Tensor:
        """``n u`` of an input, ``n (2 u - 1)`` of a weight."""
        n = self.limits()[1]
        u = torch.clamp((x - self.lower) / (self.upper - self.lower), 0, 1)
        return n * (2 * u - 1) if self.midrise else n * u

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes with the gradient-dependent (or, with ``plain_ste``, the straight-through) derivative."""
        n = self.limits()[1]
        return 2 * self._round((transformed + n) / 2) - n if self.midrise else self._round(transformed)

    def _round(self, t: Tensor) -> Tensor:
        if self.plain_ste:
            return round_ste(t)
        return ewgs_round(t, self.delta.to(t.dtype) / torch.clamp(self.limits()[1], min=1))

    @property
    def unit(self) -> float:
        """Width of the output range that the paper normalises to 1: ``delta`` acts on errors in this unit."""
        return 2.0 if self.midrise else 1.0

    def dequantize(self, codes: Tensor) -> Tensor:
        """``codes / n``, as a product with the scale."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the bounds from data, see `starting_bounds`."""
        lower, upper = starting_bounds(self._work(x), self.limits()[1], self.midrise, self.bounds)
        self.lower.copy_(lower)
        self.upper.copy_(torch.where(upper > lower, upper, lower + 1))
        self.initialised.fill_(True)
