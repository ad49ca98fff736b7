"""Weights and biases of quantized layers as integers of the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from research.deploy.deployed import DeployedWeight
from research.quant.batchnorm import fold_batchnorm
from research.quant.layers import QuantLayer
from research.quant.output_scale import OutputScale

BIAS_LIMIT = 2**30


@dataclass(frozen=True)
class IntegerWeight:
    """``weight = (codes - zero_point) * scale``, and the bias that goes with it.

    Attributes:
        codes: integers in the shape of the weight.
        scale: float64, scalar or (C,).
        zero_point: scalar or (C,), None for 0.
        bias: float64 (C,), None for none.
        container: integer type of the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    container: type[np.integer[Any]]

    def with_integer_bias(self, input_scale: float) -> tuple[IntegerWeight, Tensor, Tensor] | None:
        """The weight, the nearest integer codes of its bias (C,) and their scale ``input_scale * scale``.

        An integer kernel adds the bias to its sums, so it is a multiple of their unit. For few bits that is coarse:
        codes times the greatest power of two that the container has room for, the scale divided by it, are the same
        weight in a finer unit.

        Args:
            input_scale: scale of the layer's input codes.

        Returns:
            None without a bias, with zero points or wide codes, and for a bias beyond the integers.
        """
        if self.bias is None or self.zero_point is not None or self.container is np.int32:
            return None
        room, factor = np.iinfo(self.container), 1
        least, greatest = int(self.codes.min()), int(self.codes.max())
        while (least or greatest) and 2 * factor * least >= room.min and 2 * factor * greatest <= room.max:
            factor *= 2
        unit = self.scale / factor * input_scale
        codes = torch.round(self.bias / unit)
        if not bool((codes.abs() < BIAS_LIMIT).all()):
            return None
        finer = IntegerWeight(self.codes * factor, self.scale / factor, None, self.bias, self.container)
        return finer, codes.to(torch.int32), unit


def container(qmin: int, qmax: int) -> type[np.integer[Any]]:
    """The smallest integer type that holds the codes: uint8, int8, or int32 (there is no DequantizeLinear of int16)."""
    if qmin >= 0 and qmax <= 255:
        return np.uint8
    return np.int8 if qmin >= -128 and qmax <= 127 else np.int32


def integer_weight(name: str, layer: QuantLayer, norm: nn.BatchNorm2d | None = None) -> IntegerWeight:
    """The integers of a deployed weight, a batch-norm behind the layer taken into scale, signs and bias.

    Codes are int8, or uint8 where none is negative. The odd codes of an 8-bit mid-rise grid reach +-255: int32.

    Raises:
        ValueError: a grid without equal steps, or zero points that are no integers.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, DeployedWeight), "emitters read networks in deployed form"
    zero_point = quantizer.stored_zero_point
    integral = zero_point is None or torch.equal(zero_point, torch.round(zero_point))
    if quantizer.grid.kind not in ("uniform", "midrise") or not integral:
        raise ValueError(
            f"{name}: weights of {quantizer.spec.name} ({quantizer.grid.kind} grid) have no form in ONNX's "
            "DequantizeLinear; export the artifact only, or use a uniform or mid-rise grid with integer zero points"
        )
    limits = quantizer.integer_limits()
    codes, scale = quantizer.stored_codes.to(torch.int64).cpu(), as_float64(_flat(quantizer.stored_scale))
    bias = bias_of(layer)
    bias = None if bias is None else as_float64(bias)
    if norm is not None:
        factor, bias = _affine(layer, norm)
        shape = (-1, *[1] * (codes.dim() - 1))
        codes = codes * torch.sign(factor).to(torch.int64).reshape(shape)
        scale = torch.where(factor == 0, torch.ones_like(factor), factor.abs() * scale)
        limits = (int(codes.min()), int(codes.max())) if bool((factor < 0).any()) else limits
    return IntegerWeight(codes, scale, None if zero_point is None else _flat(zero_point), bias, container(*limits))


def can_fold(layer: QuantLayer, norm: nn.BatchNorm2d) -> bool:
    """Whether a batch-norm fits into scales, signs and bias of the layer before it, its codes' container kept."""
    quantizer = layer.weight_quantizer
    parts: Sequence[Tensor | None] = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(part is None for part in parts) or not isinstance(quantizer, DeployedWeight):
        return False
    if quantizer.grid.kind not in ("uniform", "midrise") or quantizer.stored_zero_point is not None:
        return False
    if not isinstance(layer.output_quantizer, OutputScale | None):
        return False
    negated = quantizer.stored_codes[_affine(layer, norm)[0] < 0]
    return not bool((negated == -128).any())


def bias_of(layer: QuantLayer) -> Tensor | None:
    """The bias of a convolution or linear layer."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def as_float64(values: Tensor) -> Tensor:
    """A detached copy on the CPU."""
    return values.detach().to("cpu", torch.float64)


def _affine(layer: QuantLayer, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and bias (C,), float64: output scale and batch-norm behind a layer's bare operation."""
    assert norm.running_mean is not None and norm.running_var is not None
    gamma, beta, mean, var = map(as_float64, (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    one = torch.ones(norm.num_features, dtype=torch.float64)
    if isinstance(layer.output_quantizer, OutputScale):
        one = one * as_float64(layer.output_quantizer.output_scale).abs()
    bias = bias_of(layer)
    bias = None if bias is None else one * as_float64(bias)
    return fold_batchnorm(one, bias, gamma, beta, mean, var, norm.eps)


def _flat(values: Tensor) -> Tensor:
    return values.flatten() if values.dim() else values
