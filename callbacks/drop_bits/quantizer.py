"""A semi-relaxed quantizer whose bits are dropped at random in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from callbacks.drop_bits.formulas import (
    Levels,
    hard_concrete,
    mask_of,
    masked_mass,
    most_probable,
    nested,
    nonzero_logit,
)
from research.quant.grid import code_limits
from research.quant.quantizers.srq import SRQ
from research.quant.relaxed_grid import grid_mass, mean_code, within_reach
from research.quant.ste import straight_through


class DroppedBits(SRQ):
    """`SRQ` with ``pi~_i = M_level(i) pi_i / sum_j M_level(j) pi_j`` in place of ``pi_i`` while it trains.

    One mask a level for the whole tensor, the same in all evaluations until the noise is drawn anew. In evaluation it
    is SRQ at ``bits``, with no level dropped.

    Args:
        source: the quantizer to take the place of, with its state.
        bits: of the widest grid, 2 or more.
        keep: ``sigmoid(log_a)`` at first, for every level.
        learn: whether ``log_a`` is trained.

    Attributes:
        log_a: of the levels 2 .. b, (b - 1,).
        noise: uniform in (0, 1), (b - 1,); set by the mechanic.
        decided: boolean buffer; True: all levels up to ``bits`` are on, the others off.
        bits: the width in evaluation.
    """

    choice_parameters = ("log_a",)
    parameter_options = {**SRQ.parameter_options, "log_a": {"weight_decay": 0.0}}
    noise: Tensor
    decided: Tensor
    level_bits: Tensor

    def __init__(self, source: SRQ, bits: int, keep: float, learn: bool) -> None:
        super().__init__(
            source.spec.with_bits(bits),
            source.shape,
            source.channel_axis,
            source.role,
            source.mcste,
            source.sigma_start,
            source.sigma_floor,
            source.fuzz,
            source.gradient_factor,
        )
        self.load_state_dict({**source.state_dict(), "bits": self.bits})
        self.log_a = nn.Parameter(torch.full((bits - 1,), math.log(keep / (1 - keep))), requires_grad=learn)
        self.register_buffer("noise", torch.full((bits - 1,), 0.5))
        self.register_buffer("decided", torch.tensor(False))
        self.register_buffer("level_bits", torch.arange(1.0, bits + 1), persistent=False)

    def plain(self) -> SRQ:
        """The SRQ quantizer with the same state."""
        found = SRQ(
            self.spec,
            self.shape,
            self.channel_axis,
            self.role,
            self.mcste,
            self.sigma_start,
            self.sigma_floor,
            self.fuzz,
            self.gradient_factor,
        ).to(self.log_scale)
        own = found.state_dict().keys()
        found.load_state_dict({name: value for name, value in self.state_dict().items() if name in own})
        return found.train(self.training)

    def levels(self) -> Levels:
        """The levels with their present masks; differentiable in ``log_a``."""
        drawn = nested(hard_concrete(self.log_a, self.noise))
        masks = torch.where(self.decided, (self.level_bits <= self.bits).to(drawn.dtype), drawn)
        return Levels(*code_limits(self.level_bits, self.signed, self.spec.narrow), masks)

    @property
    def nonzero(self) -> Tensor:
        """Logits of the probabilities that the levels 2 .. b are not dropped, (b - 1,)."""
        return nonzero_logit(self.log_a)

    @property
    def expected_bits(self) -> Tensor:
        """One and, of every further level, the probability that it and all below are on; decided: the width."""
        expected = 1 + torch.sigmoid(self.nonzero).cumprod(0).sum()
        return torch.where(self.decided, self.bits, expected)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """`SRQ.fake_quantize`, in training with the masked probabilities."""
        if not (self.training and rounding):
            return super().fake_quantize(x, rounding)
        levels, noise = self.levels(), self.noise_for(x)
        x = within_reach(x, *levels.limits, noise)
        codes = most_probable(x, levels, noise)
        if self.mcste == "all_classes":
            points, masses = self.near_masses(x, codes, noise, levels.low[-1], levels.high[-1])
            masked = [mask_of(point, levels) * mass for point, mass in zip(points, masses, strict=True)]
            return straight_through(codes, mean_code(points, masked)) * noise.scale
        mass = mask_of(codes, levels) * grid_mass(x, codes, codes, 1, noise)
        probability = mass / masked_mass(x, levels, noise)
        return codes * straight_through(torch.ones_like(probability), probability) * noise.scale
