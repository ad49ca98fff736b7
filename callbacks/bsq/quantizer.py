"""The weight quantizer of BSQ in training: bit stacks of final shape, of which the last n planes are live."""

from __future__ import annotations

import torch
from torch import Tensor

from callbacks.bsq.stacks import Requantized, halved, plane_digits, requantized, rounded
from callbacks.csq.planes import split
from callbacks.csq.search import PlaneWeight
from research.quant.quantizers.lsq import LSQ

LARGEST = 2.0


class BitStacks(PlaneWeight):
    """``W = s / (2^n - 1) round(clamp(sum_b 2^(n-1-b) (p_b - n_b)))`` with p, n in [0, 2] and s trained.

    The derivative of rounding and clamping is 1. The official code removes planes from its tensors; here they stay,
    as zeros without a gradient.

    Args:
        source: the LSQ quantizer to take the place of.
        planes: N, the most that a layer can have, and what it starts with.

    Attributes:
        live: n, 0-dim integer.
    """

    powers: Tensor
    live: Tensor

    def __init__(self, source: LSQ, planes: int) -> None:
        super().__init__(source, planes)
        self.register_buffer("powers", 2.0 ** torch.arange(planes - 1, -1, -1), persistent=False)
        self.register_buffer("live", torch.tensor(planes))

    @property
    def live_planes(self) -> Tensor:
        """1 for a live plane, else 0, (N,)."""
        return (self.powers < 2**self.live).to(self.powers.dtype)

    @property
    def top(self) -> Tensor:
        """``2^n - 1``, 0-dim."""
        return 2**self.live - 1

    @property
    def scale(self) -> Tensor:
        """Distance of neighbouring values, ``s / (2^n - 1)``."""
        return self.magnitude / self.top

    def units(self) -> Tensor:
        """``sum_b 2^(n-1-b) (p_b - n_b)``, (elements,)."""
        powers = (self.powers * self.live_planes)[:, None]
        return (powers * (self.positive - self.negative)).sum(0)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The weight; without rounding in mode ``relax``."""
        units = self.units()
        units = rounded(units, self.top) if rounding else torch.clamp(units, -self.top, self.top)
        return (units * self.scale).reshape(self.shape)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of the weight (int32)."""
        return rounded(self.units(), self.top).to(torch.int32).reshape(self.shape)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Split the digits of ``x``, all planes live."""
        *stacks, scale = split(x, self.planes)
        for digits, parameter in zip(stacks, (self.positive, self.negative), strict=True):
            parameter.copy_(digits.reshape(parameter.shape))
        self.live.fill_(self.planes)
        self.bits.fill_(self.planes + 1)
        self.raw_scale.copy_(scale)
        self.initialised.fill_(True)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep p and n in [0, 2]."""
        self.positive.clamp_(0, LARGEST)
        self.negative.clamp_(0, LARGEST)

    @torch.no_grad()
    def requantize(self) -> None:
        """Round to digits; grow and drop planes."""
        self._write(requantized(self.units(), self.scale, self.live, self.planes))

    @torch.no_grad()
    def halve(self) -> None:
        """Give up the least significant plane."""
        codes = halved(self.codes(self.positive).flatten(), self.live)
        self._write(Requantized(codes, 2 * self.scale, self.live - 1))

    @torch.no_grad()
    def halving_error(self) -> float:
        """Mean squared change of a weight if the least significant plane goes: what each saved bit costs."""
        codes = self.codes(self.positive)
        return float(((codes - 2 * halved(codes, self.live)) * self.scale).double().square().mean())

    def _write(self, found: Requantized) -> None:
        digits = plane_digits(found.codes, self.planes).to(self.positive.dtype)
        self.positive.copy_(digits * (found.codes > 0))
        self.negative.copy_(digits * (found.codes < 0))
        self.live.copy_(found.planes)
        self.bits.copy_(found.planes + 1)
        self.raw_scale.copy_(found.step * self.top)
