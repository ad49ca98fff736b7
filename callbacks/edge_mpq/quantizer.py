"""The quantizer of Edge-MPQ: a trained step and a trained range, from which the width follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from callbacks.edge_mpq.formulas import (
    GRADIENT_DEPENDENT,
    SURROGATES,
    Surrogate,
    in_codes,
    initial_range,
    power_of_two_step,
    projected,
    surrogate_round,
    top_code,
    width,
)
from research.quant.quantizers.base import MAX_BITS, Quantizer, QuantizerSpec, Role

RANGES = (2.0**-8, 127.0)
STEPS: dict[Role, tuple[float, float]] = {
    "weight": (2.0**-12, 1.0),
    "input": (2.0**-12, 8.0),
    "output": (2.0**-12, 8.0),
}


class StepRange(Quantizer):
    """``x_hat = d round(clip(x / xmax, lo, 1) xmax / d)`` with ``d`` and ``xmax`` trained; symmetric codes.

    The range is no multiple of the step: the greatest code is ``k = round(xmax / d)``, and ``expected_bits`` is the
    width that it needs, differentiable in both (official code, ``parametric_d_xmax``). ``bits`` states it; whoever
    changes ``d`` or ``xmax`` calls ``settle_bits``. Codes that ``bits`` does not hold are clipped, so that a pass at
    fewer bits is one. What is used of ``d`` and ``xmax`` is clipped to ``STEPS`` and ``RANGES``.

    Args:
        spec, shape, channel_axis, role: as every quantizer's; ``spec.bits`` is the width to start with, and
            ``spec.init`` plays no role.
        surrogate: slope of rounding, see `callbacks.edge_mpq.formulas.surrogate_round`.
        delta: its strength; 0 is the straight-through estimator.
        mix: share of ``tanh`` or ``invtanh`` in its slope, the rest is that of ``ewgs``.
        least: the least width that counts.
        power_of_two: steps are rounded to powers of two (an older version of the official code).

    Attributes:
        d, xmax: parameters, 0-dim or with one value per output channel.
    """

    choice_parameters = ("d", "xmax")
    parameter_options = {"d": {"weight_decay": 0.0}, "xmax": {"weight_decay": 0.0}}
    min_bits = {"weight": 2, "input": 1, "output": 1}

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        surrogate: Surrogate = "ste",
        delta: float = 0.0,
        mix: float = 1.0,
        least: int = 1,
        power_of_two: bool = False,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        if surrogate not in SURROGATES:
            raise ValueError(f"quantizer.{role}.options.surrogate={surrogate}: use one of {', '.join(SURROGATES)}")
        self.surrogate: Surrogate = surrogate
        self.delta, self.mix, self.least = delta, mix, least
        self.power_of_two = power_of_two
        if delta and surrogate in GRADIENT_DEPENDENT:
            self.backward = "gradient_dependent"  # type: ignore[misc]
        self.d = nn.Parameter(torch.full(self.state_shape, 0.1))
        self.xmax = nn.Parameter(torch.ones(self.state_shape))
        self.bits = torch.full(self.state_shape, float(spec.bits))

    @property
    def scale(self) -> Tensor:
        """The step that is used: within its limits, and a power of two where that is asked for."""
        d = power_of_two_step(self.d) if self.power_of_two else self.d
        return torch.clamp(d, *STEPS[self.role])

    @property
    def reach(self) -> Tensor:
        """The range that is used: within its limits."""
        return torch.clamp(self.xmax, *RANGES)

    @property
    def floor(self) -> int:
        """The least width that there is: one step at least, and with a sign two bits."""
        return max(self.least, 1 + int(self.signed))

    @property
    def expected_bits(self) -> Tensor:
        """The width, differentiable in ``d`` and ``xmax``; in the shape of ``d``."""
        return width(self.scale, self.reach, self.signed, self.least)

    def transform(self, x: Tensor) -> Tensor:
        """``clip(x / xmax, lo, 1) xmax / d``."""
        return in_codes(x, self.scale, self.reach, self.signed)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes with the surrogate's derivative, or with ``plain_ste`` the straight-through one."""
        delta = 0.0 if self.plain_ste else self.delta
        return torch.clamp(surrogate_round(transformed, self.surrogate, delta, self.mix), *self.limits())

    def dequantize(self, codes: Tensor) -> Tensor:
        """``d * codes``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the range from data, see `initial_range`, and the step for ``spec.bits``."""
        self.settle_sign(x)
        bits = torch.full_like(self.xmax, self.spec.bits)
        self.xmax.copy_(initial_range(self._work(x), self.role == "weight", self.channel_axis, bits).clamp(*RANGES))
        self.d.copy_(self._upwards(self.xmax / top_code(bits, self.signed)))
        self.settle_bits()
        self.initialised.fill_(True)

    @torch.no_grad()
    def project(self) -> None:
        """After a step of ``d`` and ``xmax``: back to where a width from ``least`` to 8 follows from them."""
        d, xmax = projected(self.d, self.xmax, STEPS[self.role], RANGES)
        finest = xmax / top_code(torch.full_like(d, MAX_BITS), self.signed)
        self.xmax.copy_(xmax)
        self.d.copy_(torch.maximum(d, self._upwards(finest)))
        self.settle_bits()

    @torch.no_grad()
    def settle_bits(self) -> None:
        """Let ``bits`` be the width that follows from ``d`` and ``xmax``."""
        self.bits.copy_(self.expected_bits)

    @torch.no_grad()
    def coarsen(self, bits: Tensor) -> None:
        """Make steps coarser, so that the width is ``bits`` at most; ranges stay, unless no step is coarse enough.

        Args:
            bits: in the shape of ``d``; what has no more bits keeps its step.
        """
        top = top_code(bits, self.signed)
        xmax = torch.minimum(self.reach, top * STEPS[self.role][1])
        lower = bits < self.bits
        self.xmax.copy_(torch.where(lower, xmax, self.xmax))
        self.d.copy_(torch.where(lower, self._upwards(xmax / top), self.d))
        self.settle_bits()

    def _upwards(self, d: Tensor) -> Tensor:
        return torch.exp2(torch.ceil(torch.log2(d))) if self.power_of_two else d
