"""Quantizers of inputs and outputs in the words of a runtime: subtract, divide, round, clip, multiply, add."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from research.quant.quantizers import Quantizer
from research.quant.quantizers.ewgs import EWGS

FAR = 1e30


@dataclass(frozen=True)
class AffineCodes:
    """``q = clip(round((x - shift) / scale) + zero_point, qmin, qmax)``, ``x_hat = (q - zero_point) * step + offset``.

    Attributes:
        shift: subtracted from the input.
        scale: width of a code's interval in the input.
        zero_point: integer.
        qmin, qmax: least and greatest code.
        step: distance of neighbouring values.
        offset: value of the code ``zero_point``.
    """

    shift: float
    scale: float
    zero_point: int
    qmin: int
    qmax: int
    step: float
    offset: float

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` (int32)."""
        codes = torch.round((x - self.shift) / self.scale) + self.zero_point
        return codes.clamp(self.qmin, self.qmax).to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        return (codes - self.zero_point) * self.step + self.offset

    def between(self, low: float, high: float) -> AffineCodes:
        """The form for ``x`` clipped to ``low`` and ``high`` before: its codes are those of the bounds at most."""
        qmin, qmax = self.codes(torch.tensor([low, high])).tolist()
        return replace(self, qmin=qmin, qmax=qmax)

    def unsigned(self) -> AffineCodes:
        """The same values with codes from 0 to 255, where signed ones of 8 bits or less are given.

        Runtimes have their fast kernels for unsigned inputs and signed weights.
        """
        if not -128 <= self.qmin < 0 or self.qmax > 127:
            return self
        return replace(self, zero_point=self.zero_point + 128, qmin=self.qmin + 128, qmax=self.qmax + 128)


@torch.no_grad()
def affine_codes(quantizer: Quantizer, name: str) -> AffineCodes:
    """The affine form of a per-tensor quantizer on a uniform grid, proven on all of its codes.

    The limits are read off the quantizer's codes of very small and very large numbers, since its clip may be narrower
    than its width.

    Args:
        quantizer: an input or output quantizer.
        name: what to call it in an error.

    Raises:
        ValueError: a quantizer that is no such map.
    """
    if quantizer.mode == "quantize" and quantizer.grid.kind == "uniform":
        device = quantizer.bits.device
        low, high = (int(code) for code in quantizer.codes(torch.tensor([-FAR, FAR], device=device)))
        form = _form(quantizer, low, high)
        quarters = torch.arange(4 * (low - 1), 4 * (high + 1) + 1, device=device)
        x = (quarters / 4 + 0.05 - form.zero_point) * form.scale + form.shift
        codes, values = quantizer.codes(x), quantizer(x)
        tolerance = 1e-6 * float(values.abs().max())
        if torch.equal(codes, form.codes(x)) and torch.allclose(form.values(codes), values, rtol=0, atol=tolerance):
            return form
    raise no_form(quantizer, name)


def no_form(quantizer: Quantizer, name: str) -> ValueError:
    """The error of a quantizer that is no affine map."""
    return ValueError(
        f"{name}: {type(quantizer).__name__} (mode {quantizer.mode}, grid {quantizer.grid.kind}) has no form in ONNX's "
        "QuantizeLinear; use deploy.onnx=false for the artifact alone, or a quantizer with a uniform grid"
    )


def _form(quantizer: Quantizer, qmin: int, qmax: int) -> AffineCodes:
    """The form that scale and zero point state; a zero point that is no code becomes a shift."""
    step = float(quantizer.scale)
    zero_point = 0.0 if quantizer.zero_point is None else float(quantizer.zero_point)
    if isinstance(quantizer, EWGS):
        width = float(quantizer.upper - quantizer.lower) / max(qmax, 1)
        return AffineCodes(float(quantizer.lower), width, 0, qmin, qmax, step, 0.0)
    if zero_point.is_integer() and qmin <= zero_point <= qmax:
        return AffineCodes(0.0, step, int(zero_point), qmin, qmax, step, 0.0)
    return AffineCodes(-zero_point * step, step, 0, qmin, qmax, step, -zero_point * step)
