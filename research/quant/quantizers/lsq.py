"""LSQ: learned step size (Esser, McKinstry, Bablani, Appuswamy, Modha, ICLR 2020, arXiv 1902.08153).

No official code was published; bounds count as inside, as in the widely used re-implementations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research.quant.clipping import check_mask, clip_codes
from research.quant.fused import WITH_CONVOLUTION
from research.quant.kernels import UniformGrid, positive
from research.quant.latest import Latest
from research.quant.processes import process_count
from research.quant.quantizers.base import Quantizer, QuantizerSpec, Role
from research.quant.ranges import initial_scale
from research.quant.ste import scale_gradient


def lsq_gradient_factor(elements: int | Tensor, qmax: Tensor) -> Tensor:
    """``1 / sqrt(N * Q_P)`` (LSQ, section 2.2), with ``elements`` = N of one scale and ``qmax`` = Q_P; 0-dim tensor."""
    return torch.rsqrt(elements * torch.clamp(qmax, min=1))


def sharing_elements(x: Tensor, scale: Tensor, role: Role) -> int:
    """Elements that share one value of ``scale``: of a weight ``x``, or of the whole batch of which ``x`` is this
    process's share.
    """
    return x.numel() // max(1, scale.numel()) * (1 if role == "weight" else process_count())


class LSQ(Quantizer):
    """``x_hat = s * round(clip(x / s, qmin, qmax))`` with a trainable step ``s``; clip first, then round.

    Derivatives (LSQ, equations 3 and 5): ``dx_hat/dx = 1`` inside (bounds included), 0 outside;
    ``dx_hat/ds = round(x/s) - x/s`` inside, ``qmin`` or ``qmax`` outside; the gradient of ``s`` is multiplied by
    ``1 / sqrt(N * qmax)``. N counts the elements that share one ``s``: the whole tensor, the batch included
    (``count_batch: false`` leaves the batch axis of an input out, as the paper's text has it), or one channel of it.
    ``s`` is kept positive by ``max(|s|, eps)``; it is exempt from weight decay. ``mask: round_first`` counts as inside
    what rounding brings inside, as MQBench and PyTorch's learnable fake-quantize operators do.
    """

    parameter_options = {"raw_scale": {"weight_decay": 0.0}}
    min_bits = {"weight": 2, "input": 1, "output": 1}

    def __init__(
        self,
        spec: QuantizerSpec,
        shape: Sequence[int],
        channel_axis: int | None,
        role: Role,
        count_batch: bool = True,
        gradient_factor: bool = True,
        mask: str = "clip_first",
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        self.count_batch = count_batch
        self.gradient_factor = gradient_factor
        self.mask = check_mask(mask)
        self.raw_scale = nn.Parameter(torch.ones(self.state_shape))
        self._grids = Latest[UniformGrid]()

    @property
    def scale(self) -> Tensor:
        """The step, positive, of ``state_shape``."""
        return positive(self.raw_scale)

    def _elements(self, x: Tensor) -> int:
        if self.role != "weight" and not self.count_batch:
            return x[0].numel()
        return sharing_elements(x, self.raw_scale, self.role)

    def _with_factor(self, parameter: Tensor, x: Tensor) -> Tensor:
        """``parameter`` with its gradient scaled as the step's is for data ``x``."""
        if not self.gradient_factor:
            return parameter
        qmax = self.limits()[1].to(parameter.dtype)
        return scale_gradient(parameter, lsq_gradient_factor(self._elements(x), qmax))

    @property
    def plain_lsq(self) -> bool:
        """Whether the arithmetic is LSQ's own, no subclass's."""
        return type(self).fake_quantize is LSQ.fake_quantize and type(self).transform is LSQ.transform

    def fused_grid(self, x: Tensor) -> UniformGrid | None:
        """One scale, the paper's mask, and LSQ's own arithmetic."""
        if not self.plain_lsq or self.mode != "quantize" or self.mask != "clip_first":
            return None
        if self.raw_scale.ndim or self.bits.ndim:
            return None
        elements = self._elements(x)
        if self.kernels not in WITH_CONVOLUTION:
            return self._make_grid(elements)
        made_of = (self.bits, self.signed, self.raw_scale.dtype, elements, self.rectified)
        return self._grids.get(made_of, lambda: self._make_grid(elements))

    def _make_grid(self, elements: int) -> UniformGrid:
        low, high = (limit.to(self.raw_scale.dtype) for limit in self.limits())
        factor = lsq_gradient_factor(elements, high) if self.gradient_factor else torch.ones_like(high)
        return UniformGrid(low, high, factor, self.rectified and not self.signed)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize ``x`` with one scale tensor, its gradient scaled, for both division and multiplication."""
        scale = self._with_factor(self.scale, x)
        transformed = clip_codes(x / scale, *self.limits(), mask=self.mask)
        return (self.codes_ste(transformed) if rounding else transformed) * scale

    def transform(self, x: Tensor) -> Tensor:
        """``clip(x / s, qmin, qmax)``, in units of codes."""
        return clip_codes(x / self.scale, *self.limits(), mask=self.mask)

    def dequantize(self, codes: Tensor) -> Tensor:
        """``s * codes``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set ``s`` from data by ``spec.init`` (``lsq``: ``2 mean|x| / sqrt(qmax)``, LSQ section 2.1)."""
        self.settle_sign(x)
        qmin, qmax = self.limits()
        self.raw_scale.copy_(initial_scale(x, self.spec.init, qmin, qmax, self.channel_axis))
        self.initialised.fill_(True)
