"""Quantizers as QuantizeLinear and DequantizeLinear nodes, and the builder that collects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from research.deploy.affine import affine_codes, no_form
from research.deploy.placement import Placement, Wish
from research.deploy.weights import IntegerWeight, container
from research.quant.layers import quantizers
from research.quant.quantizers.n2uq import N2UQ


@dataclass(frozen=True)
class Codes:
    """Integers behind a value: ``(codes - zero_point) * scale``, all three names of values in the graph.

    Attributes:
        codes, scale, zero_point: the names.
        step: the number that ``scale`` holds.
    """

    codes: str
    scale: str
    zero_point: str
    step: float


class GraphBuilder:
    """Collects the nodes and constants of one ONNX graph. Values are named by strings.

    Attributes:
        placement: where quantizers work.
        integers: by value, the codes that it was de-quantized from.
        applied: names of the quantizers that have worked.
        integer_biases: by layer, the integer nearest to its bias times its scale, float64 (C,), where one is asked for.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        self.placement = placement or Placement()
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.integers: dict[str, Codes] = {}
        self.applied: set[str] = set()
        self.integer_biases: dict[str, Tensor] = {}

    def constant(self, name: str, value: Tensor | npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Add an initializer; returns its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.constants[name] = numpy_helper.from_array(np.array(array, dtype=dtype, order="C"), name)
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node called ``name``; returns its output, the value of the same name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def dequantize(self, codes: Codes, name: str) -> str:
        """Add the DequantizeLinear of ``codes``; returns the value."""
        value = self.node("DequantizeLinear", [codes.codes, codes.scale, codes.zero_point], name)
        self.integers[value] = codes
        return value

    def keep_what_leads_to(self, output: str) -> None:
        """Drop nodes and constants that ``output`` does not depend on."""
        needed, nodes = {output}, []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                nodes.append(node)
        self.nodes = nodes[::-1]
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in needed}


def apply_wish(builder: GraphBuilder, wish: Wish, value: str) -> str:
    """``value`` through the quantizer of a wish, unless an earlier module did it.

    Returns:
        The quantized value.

    Raises:
        ValueError: a quantizer without such a form.
    """
    if wish.name in builder.applied:
        return value
    builder.applied.add(wish.name)
    return fake_quantize(builder, wish, value)


def require_forms(net: nn.Module) -> None:
    """Raise ValueError where a quantizer of inputs or outputs has no form in ONNX, which shows before any training."""
    for name, quantizer in quantizers(net):
        if quantizer.role != "weight" and not isinstance(quantizer, N2UQ) and quantizer.grid.kind != "uniform":
            raise no_form(quantizer, name)


def fake_quantize(builder: GraphBuilder, wish: Wish, value: str) -> str:
    """QuantizeLinear, Clip where the codes do not fill their container, DequantizeLinear; around them any offset.

    Signed codes are moved by 128 into uint8. Learned thresholds are comparisons in place of the first two, see
    `threshold_codes`.
    """
    name = wish.name
    if isinstance(wish.quantizer, N2UQ):
        codes = threshold_codes(builder, name, wish.quantizer, value)
        scale = builder.constant(f"{name}.scale", wish.quantizer.scale)
        zero_point = builder.constant(f"{name}.zero_point", 0, np.uint8)
        return builder.dequantize(
            Codes(codes, scale, zero_point, float(wish.quantizer.scale.detach())), f"{name}.values"
        )
    form = affine_codes(wish.quantizer, name).between(wish.low, wish.high).unsigned()
    if form.shift:
        value = builder.node("Sub", [value, builder.constant(f"{name}.shift", form.shift)], f"{name}.shifted")
    kind = container(form.qmin, form.qmax)
    zero_point = builder.constant(f"{name}.zero_point", form.zero_point, kind)
    scale = builder.constant(f"{name}.scale", form.scale)
    value = builder.node("QuantizeLinear", [value, scale, zero_point], f"{name}.codes")
    if (form.qmin, form.qmax) != (np.iinfo(kind).min, np.iinfo(kind).max):
        limits = [builder.constant(f"{name}.{end}", getattr(form, end), kind) for end in ("qmin", "qmax")]
        value = builder.node("Clip", [value, *limits], f"{name}.clipped")
    step = scale if form.step == form.scale else builder.constant(f"{name}.step", form.step)
    value = builder.dequantize(Codes(value, step, zero_point, form.step), f"{name}.values")
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


def weight_values(builder: GraphBuilder, name: str, weight: IntegerWeight, axis: int) -> str:
    """Integer codes and DequantizeLinear.

    Args:
        builder: where they go.
        name: of the layer.
        weight: its integers.
        axis: of the output channels.

    Returns:
        The value that the layer's operation reads.
    """
    inputs = [
        builder.constant(f"{name}.weight.codes", weight.codes, weight.container),
        builder.constant(f"{name}.weight.scale", weight.scale),
    ]
    zero_point = weight.zero_point
    if zero_point is None and weight.container is not np.int32:  # zeros: ONNX Runtime's QGemm asks for them
        zero_point = torch.zeros_like(weight.scale)
    if zero_point is not None:
        inputs.append(builder.constant(f"{name}.weight.zero_point", zero_point, weight.container))
    return builder.node("DequantizeLinear", inputs, f"{name}.weight", **({"axis": axis} if weight.scale.dim() else {}))


def bias_values(builder: GraphBuilder, name: str, codes: Tensor, scale: Tensor) -> str:
    """Integer codes (C,) of a bias in int32 and DequantizeLinear; ``scale`` is the unit of the layer's sums.

    Returns:
        The value that the layer's operation reads.
    """
    inputs = [
        builder.constant(f"{name}.bias.codes", codes, np.int32),
        builder.constant(f"{name}.bias.scale", scale),
    ]
    return builder.node("DequantizeLinear", inputs, f"{name}.bias", **({"axis": 0} if scale.dim() else {}))
