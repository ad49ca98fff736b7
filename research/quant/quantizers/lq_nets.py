"""LQ-Nets: levels from a learned basis (Zhang, Yang, Ye, Hua, ECCV 2018, arXiv 1807.10029; Microsoft/LQ-Nets).

A level is the inner product of a basis of K numbers with a binary code of K bits. The basis is no parameter: every
training pass takes one step of quantization error minimisation (QEM) towards the data. Formulas and constants are
those of the official code, where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from research.quant.grid import Grid
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ranges import reduced_axes
from research.quant.ste import straight_through

CODEBOOK = Grid("codebook")
QUARTILE = 0.6745
DECAY = 0.9
WEIGHT_RIDGE = 1e-4
INPUT_RIDGE = 1e-10
FEW = 16
"""Levels that are gone through one by one; more are looked up."""


def initial_basis(spread: Tensor, bits: int, signed: Tensor) -> Tensor:
    """``2^j`` times a constant, so that the levels are equidistant; shape of ``spread`` with ``bits`` behind.

    Args:
        spread: standard deviation of the data, any shape; of unsigned data that of the Gaussian they are the positive
            half of (the official code: ``sqrt(2 / n)`` for weights, n = kernel area times output channels; 1 for
            inputs).
        bits: K.
        signed: codes in {-1, 1}, ``0.6745 spread / 2^(K-1)``; else in {0, 1}, ``2 * 0.6745 spread / (2^K - 1)``.
    """
    unit = torch.where(signed, 1 / 2 ** (bits - 1), 2 / max(1, 2**bits - 1)).to(spread.dtype) * QUARTILE * spread
    return unit.unsqueeze(-1) * torch.exp2(torch.arange(bits, dtype=spread.dtype, device=spread.device))


def levels(basis: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """All levels of a basis, ascending, and their binary codes.

    Args:
        basis: (..., K).
        signed: whether the digits of a code are {-1, 1} or {0, 1}.

    Returns:
        Levels (..., 2^K) and digits (..., 2^K, K): a level is the inner product of its digits with the basis.
    """
    bits = basis.shape[-1]
    index = torch.arange(2**bits, device=basis.device)
    digits = ((index[:, None] >> torch.arange(bits, device=basis.device)) & 1).to(basis.dtype)
    digits = torch.where(signed, 2 * digits - 1, digits)
    values, order = torch.sort((basis.unsqueeze(-2) * digits).sum(-1), dim=-1, stable=True)
    return values, digits[order]


def _midpoints(values: Tensor) -> Tensor:
    return (values[..., :-1] + values[..., 1:]) / 2


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest level: how many midpoints of neighbouring levels lie strictly below ``x`` (int64).

    A binary search, one comparison per bit; a value on a midpoint gets the lower level.

    Args:
        x: any shape.
        values: ascending levels, (2^K,) or a scale's shape with 2^K behind.
    """
    midpoints = _midpoints(values)
    index = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for bit in reversed(range(values.shape[-1].bit_length() - 1)):
        higher = index + 2**bit
        index = torch.where(x > CODEBOOK.values(higher - 1, midpoints), higher, index)
    return index


def nearest_level(x: Tensor, values: Tensor) -> Tensor:
    """The level at `nearest`. Few are gone through one by one: no look-up, so that a compiler makes one loop of it."""
    if values.shape[-1] > FEW:
        return CODEBOOK.values(nearest(x, values), values)
    level, *higher = values.unbind(-1)
    level = level.expand(x.shape)
    for midpoint, value in zip(_midpoints(values).unbind(-1), higher, strict=True):
        level = torch.where(x > midpoint, value, level)
    return level


def level_sums(x: Tensor, values: Tensor, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """How many numbers are nearest to each level, and their sum: float64, both of the shape of ``values``.

    Args:
        x: data, any shape.
        values: ascending levels, (2^K,), or per channel a scale's shape with 2^K behind.
        channel_axis: axis with levels per index, None for the same levels everywhere.
    """
    if values.shape[-1] > FEW:
        index = nearest(x, values)
        rows = torch.arange(values[..., 0].numel(), device=x.device).view(values.shape[:-1])
        places = (index + values.shape[-1] * rows).flatten()
        counts = torch.bincount(places, minlength=values.numel()).double()
        sums = torch.zeros_like(counts).index_add_(0, places, x.flatten().double())
        return counts.view(values.shape), sums.view(values.shape)
    axes, keep = reduced_axes(x, channel_axis), channel_axis is not None

    def total(numbers: Tensor) -> Tensor:
        return numbers.sum(dim=axes, keepdim=keep, dtype=torch.float64)

    above = [torch.ones_like(x), *((x > midpoint).to(x.dtype) for midpoint in _midpoints(values).unbind(-1))]
    sums_above = [torch.stack([total(part * factor) for part in above], -1) for factor in (1.0, x)]
    counts, sums = (-torch.diff(each, append=torch.zeros_like(each[..., :1])) for each in sums_above)
    return counts, sums


def least_squares_basis(counts: Tensor, sums: Tensor, digits: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """``(B^T B + d I)^-1 (B^T x + d v)``: the basis that best rebuilds data from its codes, drawn to the present one.

    A row of B are the digits of a number's code, so that both products need no more than `level_sums`.

    Args:
        counts, sums: of the numbers at each level, (..., 2^K).
        digits: of each level's code, (..., 2^K, K).
        basis: v, (..., K).
        ridge: d; 0 is plain least squares, singular where two digits always agree.

    Returns:
        float64, shape of ``basis``.
    """
    digits = digits.double()
    gram = digits.mT @ (digits * counts.unsqueeze(-1))
    moment = (digits * sums.unsqueeze(-1)).sum(-2)
    unit = ridge * torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
    solved: Tensor = torch.linalg.solve_ex(gram + unit, moment + ridge * basis)[0]
    return solved


def narrowed(basis: Tensor, bits: Tensor) -> Tensor:
    """``basis`` (..., K) with all but its ``bits`` (...) entries of greatest magnitude at zero."""
    order = basis.abs().argsort(-1).argsort(-1)
    return torch.where(order >= basis.shape[-1] - bits.unsqueeze(-1), basis, 0.0)


class LQNets(Quantizer):
    """The nearest level of a learned basis, one per tensor or output channel; codes number the levels from below.

    Weights have digits {-1, 1} and derivative 1 everywhere; inputs {0, 1} and derivative 1 up to the highest level, 0
    above it, nothing below being masked. Inputs that calibration finds to have negative values get digits {-1, 1},
    masked on both sides (our extension). Levels have no derivative.

    In training, a forward pass that records gradients first quantizes with the present basis ``v``, then moves it:
    ``b <- 0.9 b + 0.1 v*``, ``v <- b / (1 - 0.9^s)`` at the s-th update, so that the first one sets ``v = v*``. Like
    the statistics of a batch-norm this happens neither in evaluation nor on cloned buffers. Run at fewer bits than its
    own (``passes``), the quantizer keeps the greatest entries of the basis and does not move it.

    Args:
        spec, shape, channel_axis, role: as every quantizer's; ``spec.init`` plays no role.
        debias: False: ``v <- 0.9 v + 0.1 v*``, as the paper has it.
        iterations: times that codes and ``v*`` are computed in turn for one update.

    Attributes:
        basis: ``v``, (K,) or (channels, K).
        average: ``b``, of the same shape.
        updates: ``s``, 0-dim.
    """

    basis: Tensor
    average: Tensor
    updates: Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        debias: bool = True,
        iterations: int = 1,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if spec.narrow or (role == "weight" and spec.signed is False):
            raise ValueError(f"quantizer.{role}: lq_nets has levels on both sides or none below zero, use narrow=false"
                             f"{', signed=true' if role == 'weight' else ''}")  # fmt: skip
        if iterations < 1:
            raise ValueError(f"quantizer.{role}.options.iterations={iterations}: use 1 or more")
        self.debias = debias
        self.iterations = iterations
        rows = () if self.channel_axis is None else (self.shape[self.channel_axis],)
        self.register_buffer("basis", initial_basis(torch.ones(rows), spec.bits, self.signed))
        self.register_buffer("average", torch.zeros_like(self.basis))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def grid(self) -> Grid:
        """A codebook."""
        return CODEBOOK

    def limits(self) -> tuple[Tensor, Tensor]:
        """``(0, 2^b - 1)``."""
        return CODEBOOK.limits(self.bits)

    @property
    def _repeats(self) -> Tensor:
        """How often every level stands among the 2^K sorted ones: more than once below the own width."""
        return torch.exp2(torch.clamp(self.spec.bits - self.bits, min=0)).long()

    @property
    def _broadcast(self) -> Tensor:
        """The basis in the shape of a scale with K behind."""
        return self.basis.view(*self.state_shape, self.spec.bits)

    def _levels(self) -> tuple[Tensor, Tensor]:
        return levels(narrowed(self._broadcast, self.bits), self.signed)

    @property
    def scale(self) -> Tensor:
        """The codebook: levels in ascending order, of ``state_shape`` with 2^K behind."""
        values, _ = self._levels()
        first = torch.arange(values.shape[-1], device=values.device) * self._repeats.unsqueeze(-1)
        return torch.take_along_dim(values, torch.clamp(first, max=values.shape[-1] - 1).expand(values.shape), -1)

    def transform(self, x: Tensor) -> Tensor:
        """The codes: a codebook has nothing in front of rounding."""
        index = nearest(x.detach(), self._levels()[0])
        return torch.div(index, self._repeats, rounding_mode="floor").to(x.dtype)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Nothing is left to round."""
        return transformed

    def dequantize(self, codes: Tensor) -> Tensor:
        """Levels of ``codes``."""
        return CODEBOOK.values(codes, self.scale)

    def relax(self, x: Tensor, values: Tensor) -> Tensor:
        """What the derivatives are those of: ``x``, an input cut off at the highest of the levels ``values``."""
        if self.role != "weight":
            lowest, highest = values[..., 0], values[..., -1]
            x = torch.where(x > highest, highest, x)
            x = torch.where(self.signed & (x < lowest), lowest, x)
        return torch.where(self.bits > 0, x, 0.0)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The nearest level of the present basis; then, in training, one update of the basis."""
        values, digits = self._levels()
        relaxed = self.relax(x, values)
        if not rounding:
            return relaxed
        if self.training and torch.is_grad_enabled() and self.spec.bits:
            self._update(x.detach(), values, digits)
        return straight_through(nearest_level(x.detach(), values), relaxed)

    def _update(self, x: Tensor, values: Tensor, digits: Tensor) -> None:
        """One QEM step of the basis and its moving average; none at another width than the own."""
        target = self._broadcast
        ridge = WEIGHT_RIDGE if self.role == "weight" else INPUT_RIDGE * x.numel()
        for iteration in range(self.iterations):
            if iteration:
                values, digits = levels(target, self.signed)
            counts, sums = level_sums(x, values, self.channel_axis)
            target = least_squares_basis(counts, sums, digits, target, ridge).to(self.basis.dtype)
        own = (self.bits >= self.spec.bits).all()
        average = DECAY * self.average + (1 - DECAY) * target.view_as(self.average)
        self.average.copy_(torch.where(own, average, self.average))
        self.updates.add_(own)
        present = self.average / (1 - DECAY**self.updates) if self.debias else self.average
        self.basis.copy_(torch.where(own, present, self.basis))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Equidistant levels over the spread of the data (1 where they are all zero); forget all updates."""
        self.settle_sign(x)
        x = self._work(x)
        centre = self.role == "weight"
        axes, keep = reduced_axes(x, self.channel_axis), self.channel_axis is not None
        mean = x.mean(dim=axes, keepdim=keep) if centre else torch.zeros((), dtype=x.dtype, device=x.device)
        spread = (x - mean).square().mean(dim=axes, keepdim=keep).sqrt()
        spread = torch.where(self.signed, spread, spread * 2**0.5)
        spread = torch.where(spread > torch.finfo(torch.float32).eps, spread, 1.0)
        self.basis.copy_(initial_basis(spread, self.spec.bits, self.signed).view_as(self.basis))
        self.average.copy_(torch.zeros_like(self.basis) if self.debias else self.basis)
        self.updates.zero_()
        self.initialised.fill_(True)
