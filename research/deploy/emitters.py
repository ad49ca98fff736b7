"""ONNX nodes of the leaf modules: one small function per type in `EMITTERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from research.deploy.affine import affine_codes
from research.deploy.deployed import DeployedWeight
from research.models.blocks import Add, PadShortcut
from research.quant.layers import QuantConv2d, QuantLayer, QuantLinear, QuantOutput
from research.quant.quantizers import Quantizer

END = np.iinfo(np.int64).max


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


Emitter = Callable[[GraphBuilder, str, Any, list[str]], str]


def emit(builder: GraphBuilder, name: str, module: nn.Module, inputs: list[str]) -> str:
    """Add the nodes of one call of a leaf module.

    Args:
        builder: where they go.
        name: the module's name; the node that does its operation has the same.
        module: the leaf module, in evaluation mode and deployed form.
        inputs: the values that it reads.

    Returns:
        The value that it makes.

    Raises:
        ValueError: a module or a quantizer that has no form in ONNX, naming it.
    """
    emitter = EMITTERS.get(type(module))
    if emitter is None:
        known = ", ".join(sorted(kind.__name__ for kind in EMITTERS))
        raise ValueError(f"{name}: {type(module).__name__} has no ONNX form; those that have one are {known}")
    return emitter(builder, name, module, inputs)


def _fake_quantize(builder: GraphBuilder, name: str, quantizer: nn.Module, value: str) -> str:
    """QuantizeLinear, Clip where the codes do not fill their container, DequantizeLinear; around them any offset."""
    if not isinstance(quantizer, Quantizer):
        return emit(builder, name, quantizer, [value])
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


def _container(qmin: int, qmax: int) -> type[np.integer[Any]]:
    """The smallest integer type that holds the codes: uint8, int8, or int32 (there is no DequantizeLinear of int16)."""
    if qmin >= 0 and qmax <= 255:
        return np.uint8
    return np.int8 if qmin >= -128 and qmax <= 127 else np.int32


def _weight(builder: GraphBuilder, name: str, layer: QuantLayer) -> str:
    """Integer codes and DequantizeLinear; float where the layer has no weight quantizer.

    Codes are int8, or uint8 where none is negative. The odd codes of an 8-bit mid-rise grid reach +-255: int32.
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


def _layer_inputs(builder: GraphBuilder, name: str, layer: Any, inputs: list[str]) -> list[str]:
    """Input, weight and bias of a convolution or linear layer, through its quantizers."""
    (value,) = inputs
    if isinstance(layer, QuantLayer):
        if layer.input_quantizer is not None:
            value = _fake_quantize(builder, f"{name}.input", layer.input_quantizer, value)
        weight = _weight(builder, name, layer)
    else:
        weight = builder.constant(f"{name}.weight", layer.weight)
    bias = [] if layer.bias is None else [builder.constant(f"{name}.bias", layer.bias)]
    return [value, weight, *bias]


def _layer_output(builder: GraphBuilder, name: str, layer: Any, value: str) -> str:
    if isinstance(layer, QuantLayer) and layer.output_quantizer is not None:
        return _fake_quantize(builder, f"{name}.output", layer.output_quantizer, value)
    return value


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv(builder: GraphBuilder, name: str, layer: nn.Conv2d, inputs: list[str]) -> str:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"{name}: padding={layer.padding!r} ({layer.padding_mode}); use zeros and a number of pixels")
    value = builder.node(
        "Conv",
        _layer_inputs(builder, name, layer, inputs),
        name,
        strides=list(layer.stride),
        pads=list(layer.padding) * 2,
        dilations=list(layer.dilation),
        group=layer.groups,
        kernel_shape=list(layer.kernel_size),
    )
    return _layer_output(builder, name, layer, value)


def _linear(builder: GraphBuilder, name: str, layer: nn.Linear, inputs: list[str]) -> str:
    value = builder.node("Gemm", _layer_inputs(builder, name, layer, inputs), name, transB=1)
    return _layer_output(builder, name, layer, value)


def _batchnorm(builder: GraphBuilder, name: str, norm: nn.BatchNorm2d, inputs: list[str]) -> str:
    parts = {"weight": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
    if any(part is None for part in parts.values()):
        raise ValueError(f"{name}: a batch-norm without affine parameters or running statistics has no ONNX form here")
    names = [builder.constant(f"{name}.{key}", part) for key, part in parts.items() if part is not None]
    return builder.node("BatchNormalization", [*inputs, *names], name, epsilon=norm.eps)


def _clip(low: float, high: float) -> Emitter:
    def emitter(builder: GraphBuilder, name: str, module: nn.Module, inputs: list[str]) -> str:
        bounds = [builder.constant(f"{name}.low", low), builder.constant(f"{name}.high", high)]
        return builder.node("Clip", [*inputs, *bounds], name)

    return emitter


def _hardtanh(builder: GraphBuilder, name: str, module: nn.Hardtanh, inputs: list[str]) -> str:
    return _clip(module.min_val, module.max_val)(builder, name, module, inputs)


def _pad_shortcut(builder: GraphBuilder, name: str, module: PadShortcut, inputs: list[str]) -> str:
    value = inputs[0]
    if module.stride != 1:
        limits = {"starts": [0, 0], "ends": [END, END], "axes": [2, 3], "steps": [module.stride] * 2}
        slices = [builder.constant(f"{name}.{key}", numbers, np.int64) for key, numbers in limits.items()]
        value = builder.node("Slice", [value, *slices], f"{name}.pixels")
    pads = builder.constant(f"{name}.pads", [0, module.padding, 0, 0, 0, module.padding, 0, 0], np.int64)
    return builder.node("Pad", [value, pads], name)


def _global_average(builder: GraphBuilder, name: str, module: nn.AdaptiveAvgPool2d, inputs: list[str]) -> str:
    if module.output_size not in (1, (1, 1)):
        raise ValueError(f"{name}: AdaptiveAvgPool2d to {module.output_size} has no ONNX form here; use 1")
    return builder.node("GlobalAveragePool", inputs, name)


def _pool(builder: GraphBuilder, name: str, module: nn.MaxPool2d | nn.AvgPool2d, inputs: list[str]) -> str:
    shape: dict[str, Any] = {
        "kernel_shape": _pair(module.kernel_size),
        "strides": _pair(module.stride),
        "pads": _pair(module.padding) * 2,
        "ceil_mode": int(module.ceil_mode),
    }
    if isinstance(module, nn.MaxPool2d):
        return builder.node("MaxPool", inputs, name, dilations=_pair(module.dilation), **shape)
    if module.divisor_override is not None or module.ceil_mode:
        raise ValueError(f"{name}: AvgPool2d with divisor_override or ceil_mode has no ONNX form here")
    return builder.node("AveragePool", inputs, name, count_include_pad=int(module.count_include_pad), **shape)


def _flatten(builder: GraphBuilder, name: str, module: nn.Flatten, inputs: list[str]) -> str:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"{name}: Flatten({module.start_dim}, {module.end_dim}) has no ONNX form here; use Flatten(1)")
    return builder.node("Flatten", inputs, name, axis=1)


def _quant_output(builder: GraphBuilder, name: str, module: QuantOutput, inputs: list[str]) -> str:
    value = emit(builder, name, module.module, inputs)
    return _fake_quantize(builder, f"{name}.output", module.output_quantizer, value)


EMITTERS: dict[type[nn.Module], Emitter] = {
    nn.Conv2d: _conv,
    QuantConv2d: _conv,
    nn.Linear: _linear,
    QuantLinear: _linear,
    QuantOutput: _quant_output,
    nn.BatchNorm2d: _batchnorm,
    nn.ReLU: lambda builder, name, module, inputs: builder.node("Relu", inputs, name),
    nn.ReLU6: _clip(0.0, 6.0),
    nn.Hardtanh: _hardtanh,
    Add: lambda builder, name, module, inputs: builder.node("Add", inputs, name),
    PadShortcut: _pad_shortcut,
    nn.AdaptiveAvgPool2d: _global_average,
    nn.AvgPool2d: _pool,
    nn.MaxPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Dropout: lambda builder, name, module, inputs: inputs[0],
    nn.Identity: lambda builder, name, module, inputs: inputs[0],
}
