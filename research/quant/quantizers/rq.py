"""RQ: relaxed quantization, a sampled grid point with the gradient of Gumbel-softmax.

Louizos, Reisser, Blankevoort, Gavves, Welling, ICLR 2019, arXiv 1810.01875; no official code was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from research.quant.quantizers.base import QuantizerSpec, Role
from research.quant.quantizers.relaxed import RelaxedQuantizer
from research.quant.relaxed_grid import Noise, gumbel_noise, relaxed_choice, stochastic_mass, window
from research.quant.ste import straight_through

Sample = Literal["relaxed", "hard"]
SAMPLES: tuple[Sample, ...] = get_args(Sample)
Kind = Literal["logistic", "uniform"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class RQ(RelaxedQuantizer):
    """Training draws ``z = softmax((log pi + gumbel) / temperature)`` and uses ``alpha sum_i z_i i``.

    Noise is fresh in every evaluation, from the default generator. In evaluation it is the plain uniform quantizer,
    with the derivatives of the expected value ``alpha sum_i pi_i i``.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        temperature: lambda; None: 1 up to 2 bits, else 0.5.
        sample: ``relaxed``, or ``hard`` (RQ-ST): the grid point of the greatest ``log pi_i + gumbel_i`` in the forward
            pass, the relaxed sample in the backward pass.
        noise: ``logistic``, or ``uniform``: stochastic rounding, in which sigma plays no part.
        sigma_start, sigma_floor, fuzz, gradient_factor: see `RelaxedQuantizer`.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        temperature: float | None = None,
        sample: Sample = "relaxed",
        noise: Kind = "logistic",
        sigma_start: float = 1 / 3,
        sigma_floor: float = 0.05,
        fuzz: float = 1e-6,
        gradient_factor: bool = True,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role, sigma_start, sigma_floor, fuzz, gradient_factor)
        key = f"quantizer.{role}.options"
        if temperature is not None and temperature <= 0:
            raise ValueError(f"{key}.temperature={temperature}: use more than 0, such as 1")
        for name, value, known in (("sample", sample, SAMPLES), ("noise", noise, KINDS)):
            if value not in known:
                raise ValueError(f"{key}.{name}={value}: use one of {', '.join(known)}")
        self.temperature = (1.0 if spec.bits <= 2 else 0.5) if temperature is None else temperature
        self.sample, self.noise = sample, noise
        if noise == "uniform":
            self.log_sigma.requires_grad_(False)

    def point_mass(self, x: Tensor, point: Tensor, noise: Noise) -> Tensor:
        """`RelaxedQuantizer.point_mass`, with either kind of noise."""
        if self.noise == "logistic":
            return super().point_mass(x, point, noise)
        return stochastic_mass(torch.clamp(x / noise.scale, *self.limits()) * noise.scale, point, noise)

    def relaxed_codes(self, x: Tensor, codes: Tensor, noise: Noise) -> Tensor:
        """A sample in training, else ``codes`` with the derivatives of the expected ones."""
        if not self.training:
            return straight_through(codes, self.expected_codes(x, codes, noise))
        low, high = self.limits()
        points = window(codes, low, high, self.points)
        log_masses = torch.stack(
            [torch.where(point <= high, torch.log(self.point_mass(x, point, noise)), -torch.inf) for point in points],
            -1,
        )
        return self.sampled_codes(torch.stack(points, -1), log_masses, gumbel_noise(log_masses))

    def sampled_codes(self, points: Tensor, log_masses: Tensor, gumbel: Tensor) -> Tensor:
        """The sample's codes for given noise; all arguments (..., points)."""
        relaxed = (relaxed_choice(log_masses, gumbel, self.temperature) * points).sum(-1)
        if self.sample == "relaxed":
            return relaxed
        chosen = (log_masses + gumbel).detach().argmax(-1, keepdim=True)
        return straight_through(points.gather(-1, chosen).squeeze(-1), relaxed)
