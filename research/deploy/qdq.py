"""Quantizers as QuantizeLinear and DequantizeLinear nodes, and the builder that collects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from research.deploy.affine import affine_codes
from research.deploy.deployed import DeployedWeight
from research.quant.layers import QuantLayer
from research.quant.quantizers import Quantizer
from research.quant.quantizers.n2uq import N2UQ


class GraphBuilder:
    """Collects the nodes and constants of one ONNX graph. Values are named by strings."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def constant(self, name: str, value: Tensor | npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Add an initializer; returns its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.constants[name] = numpy_helper.from_array(np.array(array, dtype=dtype, order="C"), name)
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node called ``name``; returns its output, the value of the same name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name


def fake_quantize(builder: GraphBuilder, name: str, quantizer: Quantizer, value: str) -> str:
    """QuantizeLinear, Clip where the codes do not fill their container, DequantizeLinear; around them any offset.

    Learned thresholds are comparisons in place of the first two, see `threshold_codes`.

    Returns:
        The quantized value.

    Raises:
        ValueError: a quantizer without such a form.
    """
    if isinstance(quantizer, N2UQ):
        codes = threshold_codes(builder, name, quantizer, value)
        parts = [
            builder.constant(f"{name}.scale", quantizer.scale),
            builder.constant(f"{name}.zero_point", 0, np.uint8),
        ]
        return builder.node("DequantizeLinear", [codes, *parts], f"{name}.values")
    form = affine_codes(quantizer, name)
    if form.shift:
        value = builder.node("Sub", [value, builder.constant(f"{name}.shift", form.shift)], f"{name}.shifted")
    container = _container(form.qmin, form.qmax)
    zero_point = builder.constant(f"{name}.zero_point", form.zero_point, container)
    scale = builder.constant(f"{name}.scale", form.scale)
    value = builder.node("QuantizeLinear", [value, scale, zero_point], f"{name}.codes")
    if (form.qmin, form.qmax) != (np.iinfo(container).min, np.iinfo(container).max):
        limits = [builder.constant(f"{name}.{end}", getattr(form, end), container) for end in ("qmin", "qmax")]
        value = builder.node("Clip", [value, *limits], f"{name}.clipped")
    step = scale if form.step == form.scale else builder.constant(f"{name}.step", form.step)
    value = builder.node("DequantizeLinear", [value, step, zero_point], f"{name}.values")
    if form.offset:
        value = builder.node("Add", [value, builder.constant(f"{name}.offset", form.offset)], f"{name}.offset_values")
    return value


def threshold_codes(builder: GraphBuilder, name: str, quantizer: N2UQ, value: str) -> str:
    """The number of thresholds below the scaled input, as uint8: Mul, then Greater, Cast and Add for each of them.

    The input is multiplied by ``scale1`` as in training, and not the thresholds divided by it, so that the codes are
    bitwise the same.

    Returns:
        The codes.

    Raises:
        ValueError: a mode other than ``quantize``, or a width other than that of the thresholds.
    """
    if quantizer.mode != "quantize" or not torch.equal(
        quantizer.bits, torch.full_like(quantizer.bits, quantizer.spec.bits)
    ):
        raise ValueError(
            f"{name}: N2UQ (mode {quantizer.mode}) has thresholds for {quantizer.spec.bits} bits; "
            "export it in mode quantize and at that width"
        )
    assert quantizer.scale1 is not None, "thresholds are those of an input"
    value = builder.node("Mul", [value, builder.constant(f"{name}.scale1", quantizer.scale1)], f"{name}.scaled")
    count = ""
    for index, threshold in enumerate(quantizer.thresholds):
        bound = builder.constant(f"{name}.threshold{index}", threshold)
        above = builder.node("Greater", [value, bound], f"{name}.above{index}")
        one = builder.node("Cast", [above], f"{name}.one{index}", to=TensorProto.FLOAT)
        count = builder.node("Add", [count, one], f"{name}.count{index}") if count else one
    return builder.node("Cast", [count], f"{name}.codes", to=TensorProto.UINT8)


def _container(qmin: int, qmax: int) -> type[np.integer[Any]]:
    """The smallest integer type that holds the codes: uint8, int8, or int32 (there is no DequantizeLinear of int16)."""
    if qmin >= 0 and qmax <= 255:
        return np.uint8
    return np.int8 if qmin >= -128 and qmax <= 127 else np.int32


def weight_values(builder: GraphBuilder, name: str, layer: QuantLayer) -> str:
    """Integer codes and DequantizeLinear; float where the layer has no weight quantizer.

    Codes are int8, or uint8 where none is negative. The odd codes of an 8-bit mid-rise grid reach +-255: int32.

    Returns:
        The value that the layer's operation reads.

    Raises:
        ValueError: a grid without equal steps, or zero points that are no integers.
    """
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return builder.constant(f"{name}.weight", layer.weight)
    assert isinstance(quantizer, DeployedWeight), "emitters read networks in deployed form"
    scale, zero_point = quantizer.stored_scale, quantizer.stored_zero_point
    integral = zero_point is None or torch.equal(zero_point, torch.round(zero_point))
    if quantizer.grid.kind not in ("uniform", "midrise") or not integral:
        raise ValueError(
            f"{name}: weights of {quantizer.spec.name} ({quantizer.grid.kind} grid) have no form in ONNX's "
            "DequantizeLinear; export the artifact only, or use a uniform or mid-rise grid with integer zero points"
        )
    container = _container(*quantizer.integer_limits())
    inputs = [
        builder.constant(f"{name}.weight.codes", quantizer.stored_codes, container),
        builder.constant(f"{name}.weight.scale", scale.flatten() if scale.dim() else scale),
    ]
    if zero_point is not None:
        flat = zero_point.flatten() if zero_point.dim() else zero_point
        inputs.append(builder.constant(f"{name}.weight.zero_point", flat, container))
    axis = {"axis": layer.channel_axis} if scale.dim() else {}
    return builder.node("DequantizeLinear", inputs, f"{name}.weight", **axis)
