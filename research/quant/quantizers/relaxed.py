"""What the relaxed quantizers share: a uniform grid whose step and whose noise are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.quantizers.lsq import lsq_gradient_factor, sharing_elements
from research.quant.ranges import initial_scale
from research.quant.relaxed_grid import Noise, grid_mass, mean_code, window, within_reach
from research.quant.ste import scale_gradient

LOCAL = 16
"""Most grid points that are looked at one by one: all of them up to 4 bits, else the nearest."""


class RelaxedQuantizer(Quantizer):
    """A uniform grid ``alpha * codes`` with logistic noise of scale ``sigma`` in front of rounding.

    ``alpha = exp(log_scale)`` and ``sigma = exp(log_sigma) + sigma_floor * alpha`` (no gradient to ``alpha`` there) are
    trained and not decayed; both are positive by construction. Codes and values are those of a plain uniform quantizer:
    ``alpha round(clip(x / alpha, qmin, qmax))``. Subclasses say what training and the derivatives are.

    Args:
        spec, shape, channel_axis, role: as every quantizer's.
        sigma_start: first ``sigma``, as a part of ``alpha``.
        sigma_floor: least ``sigma``, as a part of ``alpha``; 0: none.
        fuzz: what is added to the probability of every grid point.
        gradient_factor: multiply the gradients of both logarithms by LSQ's ``1 / sqrt(N qmax)``, where N elements share
            them: their sums over all elements are too large for SGD. Adam does not care.
    """

    parameter_options = {"log_scale": {"weight_decay": 0.0}, "log_sigma": {"weight_decay": 0.0}}

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        sigma_start: float = 1 / 3,
        sigma_floor: float = 0.05,
        fuzz: float = 1e-6,
        gradient_factor: bool = True,
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        key = f"quantizer.{role}.options"
        if not 0 <= sigma_floor < sigma_start:
            raise ValueError(
                f"{key}: sigma_start={sigma_start}, sigma_floor={sigma_floor}: use parts of the step, the floor 0 or "
                "more and below the start"
            )
        if fuzz <= 0:
            raise ValueError(f"{key}.fuzz={fuzz}: use a small number above 0, such as 1e-6")
        self.sigma_start, self.sigma_floor, self.fuzz = sigma_start, sigma_floor, fuzz
        self.gradient_factor = gradient_factor
        self.points = min(2 ** max(1, spec.bits), LOCAL)
        self.log_scale = nn.Parameter(torch.zeros(self.state_shape))
        self.log_sigma = nn.Parameter(torch.full(self.state_shape, math.log(sigma_start - sigma_floor)))

    @property
    def scale(self) -> Tensor:
        """The step alpha, positive, of ``state_shape``."""
        return torch.exp(self.log_scale)

    @property
    def sigma(self) -> Tensor:
        """Scale of the noise, positive, of ``state_shape``."""
        return self._sigma(self.log_sigma)

    def _sigma(self, log_sigma: Tensor) -> Tensor:
        return torch.exp(log_sigma) + self.sigma_floor * self.scale.detach()

    def noise_for(self, x: Tensor) -> Noise:
        """Step and noise, with the gradients that they are to have for data ``x``."""
        log_scale: Tensor = self.log_scale
        log_sigma: Tensor = self.log_sigma
        if self.gradient_factor:
            elements = sharing_elements(x, log_scale, self.role)
            factor = lsq_gradient_factor(elements, self.limits()[1].to(log_scale.dtype))
            log_scale, log_sigma = scale_gradient(log_scale, factor), scale_gradient(log_sigma, factor)
        return Noise(torch.exp(log_scale), self._sigma(log_sigma), self.fuzz)

    def transform(self, x: Tensor) -> Tensor:
        """``clip(x / alpha, qmin, qmax)``, in units of codes."""
        return torch.clamp(x / self.scale, *self.limits())

    def dequantize(self, codes: Tensor) -> Tensor:
        """``alpha * codes``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """``alpha`` times the codes of `relaxed_codes`, or the clipped value without rounding."""
        if not rounding:
            return self.dequantize(self.transform(x))
        limits, noise = self.limits(), self.noise_for(x)
        codes = torch.round(self.transform(x).detach())
        return self.relaxed_codes(within_reach(x, *limits, noise), codes, noise) * noise.scale

    def relaxed_codes(self, x: Tensor, codes: Tensor, noise: Noise) -> Tensor:
        """The codes that ``x`` gets, with the derivatives of the relaxation.

        Args:
            x: values `within_reach`.
            codes: the nearest ones, of the shape of ``x``.
            noise: step and noise.
        """
        raise NotImplementedError

    def point_mass(self, x: Tensor, point: Tensor, noise: Noise) -> Tensor:
        """`grid_mass` of a single point for each element of ``x``, of its shape."""
        return grid_mass(x, point, point, 1, noise)

    def near_masses(
        self, x: Tensor, codes: Tensor, noise: Noise, low: Tensor, high: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Grid points around ``codes`` and their masses, 0 above ``high``."""
        points = window(codes, low, high, self.points)
        return points, [torch.where(point <= high, self.point_mass(x, point, noise), 0.0) for point in points]

    def expected_codes(self, x: Tensor, codes: Tensor, noise: Noise) -> Tensor:
        """``sum_i pi_i i`` over the points near ``codes``: the mean of the noisy quantizer, in units of codes."""
        return mean_code(*self.near_masses(x, codes, noise, *self.limits()))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set alpha from data by ``spec.init``, and sigma as a part of it."""
        self.settle_sign(x)
        scale = initial_scale(x, self.spec.init, *self.limits(), self.channel_axis)
        self.log_scale.copy_(torch.log(scale))
        self.log_sigma.copy_(torch.log((self.sigma_start - self.sigma_floor) * scale))
        self.initialised.fill_(True)
