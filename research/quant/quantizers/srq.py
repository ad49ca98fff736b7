"""SRQ: semi-relaxed quantization, the most probable grid point with a multi-class straight-through estimator.

Lee, Yun, Hwang, Yang, "Semi-Relaxed Quantization with DropBits", arXiv 1911.12990 (ICCV 2021 as "Cluster-Promoting
Quantization with Bit-Drop", arXiv 2109.02100). A reconstruction: the estimator is from memory, see docs/methods/srq.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from research.quant.quantizers.base import QuantizerSpec, Role
from research.quant.quantizers.relaxed import RelaxedQuantizer
from research.quant.relaxed_grid import Noise, grid_mass
from research.quant.ste import straight_through

MultiClass = Literal["argmax_only", "all_classes"]
MULTI_CLASS: tuple[MultiClass, ...] = get_args(MultiClass)


class SRQ(RelaxedQuantizer):
    """The grid point of the greatest ``pi_i``, which is the nearest: the same in training and evaluation, no noise.

    Derivatives, the same in both: ``argmax_only``: those of ``alpha i* (1 + pi_i* - sg(pi_i*))``, in closed form (four
    sigmoids an element); elements with the code 0 get none of their own. ``all_classes``: those of
    ``alpha (i* + sum_i pi_i i - sg(...))``, the expected value.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        mcste: the estimator.
        sigma_start, sigma_floor, fuzz, gradient_factor: see `RelaxedQuantizer`.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        mcste: MultiClass = "argmax_only",
        sigma_start: float = 1 / 3,
        sigma_floor: float = 0.05,
        fuzz: float = 1e-6,
        gradient_factor: bool = True,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role, sigma_start, sigma_floor, fuzz, gradient_factor)
        if mcste not in MULTI_CLASS:
            raise ValueError(f"quantizer.{role}.options.mcste={mcste}: use one of {', '.join(MULTI_CLASS)}")
        self.mcste = mcste

    def relaxed_codes(self, x: Tensor, codes: Tensor, noise: Noise) -> Tensor:
        """``codes``, with the derivatives of the estimator."""
        if self.mcste == "all_classes":
            return straight_through(codes, self.expected_codes(x, codes, noise))
        low, high = self.limits()
        probability = grid_mass(x, codes, codes, 1, noise) / grid_mass(x, low, high, high - low + 1, noise)
        return codes * straight_through(torch.ones_like(probability), probability)
