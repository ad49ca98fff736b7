"""Freezing codes: which are frozen at what, the layer's slot that holds them, and the exact weight they become."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from callbacks.oscillation.history import CodeHistory
from research.deploy.deployed import DeployedWeight
from research.quant.grid import GridKind
from research.quant.layers import QuantLayer
from research.quant.quantizers.base import Quantizer
from research.quant.quantizers.lsq import LSQ, lsq_gradient_factor
from research.quant.ste import scale_gradient

FreezeTo = Literal["average", "current"]


class Freezing(NamedTuple):
    """Frozen codes after some steps; all tensors have the shape of the weight.

    Attributes:
        frozen: which codes are frozen.
        frozen_codes: at what, 0 where not frozen.
        average: exponential average of the codes.
    """

    frozen: Tensor
    frozen_codes: Tensor
    average: Tensor


def nearest_code(values: Tensor, kind: GridKind = "uniform") -> Tensor:
    """The code next to each value: integers, half to even, or (``midrise``) odd integers."""
    return 2 * torch.round((values - 1) / 2) + 1 if kind == "midrise" else torch.round(values)


def freeze(
    before: Freezing,
    codes: Tensor,
    frequency: Tensor,
    momentum: float,
    threshold: float,
    freeze_to: FreezeTo = "average",
    kind: GridKind = "uniform",
) -> Freezing:
    """One step of iterative weight freezing (arXiv 2203.11086, its algorithm 1; order of the official code).

    What oscillates more often than ``threshold`` is frozen for good, at the code nearest to the average so far; then
    the average moves, ``e_t = m q_t + (1 - m) e_(t-1)``.

    Args:
        before: the state so far; at the first step its ``average`` is ``codes``.
        codes: codes of now, frozen ones included.
        frequency: f of `research.quant.oscillation`, this step included.
        momentum: m, as for ``frequency``.
        threshold: above 0.
        freeze_to: ``average``, or ``current``: at the codes of now.
        kind: grid of the codes.
    """
    new = (frequency > threshold) & ~before.frozen
    target = nearest_code(before.average, kind) if freeze_to == "average" else codes
    return Freezing(
        frozen=before.frozen | new,
        frozen_codes=torch.where(new, target.to(before.frozen_codes.dtype), before.frozen_codes),
        average=momentum * codes + (1 - momentum) * before.average,
    )


class FreezableHistory(CodeHistory):
    """A `CodeHistory` with the state of `Freezing` as buffers; ``started``: the average exists."""

    frozen: Tensor
    frozen_codes: Tensor
    average: Tensor
    started: Tensor

    def __init__(self, weight: Tensor, bits: Tensor) -> None:
        super().__init__(weight, bits)
        for name, dtype in zip(Freezing._fields, (torch.bool, torch.int16, torch.float32), strict=True):
            self.register_buffer(name, torch.zeros(weight.shape, dtype=dtype))
        self.register_buffer("started", torch.tensor(False))

    def freeze(self, momentum: float, threshold: float, freeze_to: FreezeTo, kind: GridKind) -> None:
        """`freeze` by the codes and frequencies of the last look; the average begins with the first call."""
        average = torch.where(self.started, self.average, self.codes.to(self.average.dtype))
        before = Freezing(self.frozen, self.frozen_codes, average)
        after = freeze(before, self.codes, self.frequency, momentum, threshold, freeze_to, kind)
        for name, value in after._asdict().items():
            getattr(self, name).copy_(value)
        self.started.fill_(True)


class FrozenCodes(nn.Module):
    """Goes into a layer's ``weight_override``: frozen codes in place of those that the latent weight has.

    A frozen element's value still follows the scale, ``dx_hat/ds = code`` (times LSQ's gradient factor, where the
    quantizer has one), and gives its latent weight no gradient. Modes other than ``quantize`` know no codes and pass.
    """

    def __init__(self, history: FreezableHistory) -> None:
        super().__init__()
        self._history = (history,)  # in a tuple: a reference, the buffers belong to the mechanic

    @property
    def history(self) -> FreezableHistory:
        """The layer's history."""
        return self._history[0]

    def codes(self, codes: Tensor) -> Tensor:
        """``codes``, where frozen replaced."""
        history = self.history
        return torch.where(history.frozen, history.frozen_codes.to(codes.dtype), codes)

    def forward(self, x_hat: Tensor, layer: QuantLayer) -> Tensor:
        """``x_hat`` with frozen elements replaced (same shape and dtype)."""
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        if quantizer.mode != "quantize":
            return x_hat
        values = fixed_values(quantizer, self.history.frozen_codes)
        return torch.where(self.history.frozen, values.to(x_hat.dtype), x_hat)


def fixed_values(quantizer: Quantizer, codes: Tensor) -> Tensor:
    """De-quantized ``codes``, of a whole weight, with the gradient to the scale that the quantizer's forward gives."""
    values = quantizer.dequantize(codes)
    if isinstance(quantizer, LSQ) and quantizer.gradient_factor:
        qmax = quantizer.limits()[1].to(values.dtype)
        values = scale_gradient(values, lsq_gradient_factor(codes.numel() // quantizer.scale.numel(), qmax))
    return values


@torch.no_grad()
def used_codes(layer: QuantLayer) -> Tensor:
    """Codes that the layer computes with (int32), frozen ones included."""
    assert layer.weight_quantizer is not None
    codes = layer.weight_quantizer.codes(layer.float_weight())
    override = layer.weight_override
    return override.codes(codes) if isinstance(override, FrozenCodes) else codes


@torch.no_grad()
def settle(layer: QuantLayer) -> None:
    """Put the used codes in the place of quantizer and override; the layer computes the same, bit for bit.

    The latent weight stays what it is: it no longer says what its codes are.
    """
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    layer.weight_quantizer = DeployedWeight.of(quantizer, used_codes(layer))
    layer.weight_override = None
