"""ONNX nodes of the leaf modules: one small function per type in `EMITTERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from research.deploy.graph import Node
from research.deploy.placement import Wish, clip_bounds, movable_form
from research.deploy.qdq import GraphBuilder, apply_wish, bias_values, weight_values
from research.deploy.weights import IntegerWeight, integer_weight
from research.models.bias_prelu import BiasPReLU
from research.models.blocks import Add, PadShortcut
from research.quant.layers import QuantConv2d, QuantLayer, QuantLinear, QuantOutput
from research.quant.output_scale import OutputScale
from research.quant.quantizers import Quantizer

END = np.iinfo(np.int64).max
BIAS_TOLERANCE = 1e-4
"""How far the integer bias may be from the bias, in steps of the quantizer behind it: what a float sum is off too."""


Emitter = Callable[[GraphBuilder, str, Any, list[str]], str]


def emit_node(builder: GraphBuilder, node: Node, inputs: list[str]) -> str:
    """Add the nodes of one call of a leaf module, and of the quantizer that `place` puts on its output.

    Args:
        builder: where they go.
        node: the call; its module is in evaluation mode and deployed form.
        inputs: the values that it reads.

    Returns:
        The value that it makes.

    Raises:
        ValueError: a module or a quantizer that has no form in ONNX, naming it.
    """
    placement = builder.placement
    module = node.module
    crossed = node.name in placement.crossed
    if crossed and isinstance(module, QuantOutput):
        module = module.module
    if node.name in placement.merged or (crossed and clip_bounds(module)):
        value = inputs[0]
    else:
        value = emit(builder, node.name, module, inputs)
    wish = placement.wishes.get(node.name)
    return value if wish is None else apply_wish(builder, wish, value)


def emit(builder: GraphBuilder, name: str, module: nn.Module, inputs: list[str]) -> str:
    """Add the nodes of a module; the node that does its operation is called ``name``. Else as `emit_node`."""
    emitter = EMITTERS.get(type(module))
    if emitter is None:
        known = ", ".join(sorted(kind.__name__ for kind in EMITTERS))
        raise ValueError(f"{name}: {type(module).__name__} has no ONNX form; those that have one are {known}")
    return emitter(builder, name, module, inputs)


def _operation(
    builder: GraphBuilder, operator: str, name: str, layer: nn.Conv2d | nn.Linear, value: str, **attributes: Any
) -> str:
    """A convolution or linear layer: quantized input, operation, bias, output quantizer.

    A bias is an Add of its own, but where a quantizer follows and the bias is an integer (see
    `research.deploy.biases`): only there can a runtime stay with integers. ONNX Runtime would round a float bias
    inside Conv or Gemm to multiples of ``s_x * s_w``, which at 4 bits is as much as a change of codes.
    """
    if not isinstance(layer, QuantLayer):
        constants = {"weight": layer.weight, "bias": layer.bias}
        parts = [builder.constant(f"{name}.{key}", part) for key, part in constants.items() if part is not None]
        return builder.node(operator, [value, *parts], name, **attributes)
    if isinstance(layer.input_quantizer, Quantizer):
        value = apply_wish(builder, Wish(f"{name}.input", layer.input_quantizer), value)
    norm = builder.placement.norms.get(name)
    if layer.weight_quantizer is None:
        bias, parts = layer.bias, [builder.constant(f"{name}.weight", layer.weight)]
    else:
        weight = integer_weight(name, layer, norm)
        bias, parts = weight.bias, []
        if (integers := _integer_bias(builder, name, layer, weight, value)) is not None:
            (weight, codes, unit), bias = integers, None
            parts = [bias_values(builder, name, codes, unit)]
        parts.insert(0, weight_values(builder, name, weight, layer.channel_axis))
    value = builder.node(operator, [value, *parts], name, **attributes)
    if bias is not None:
        shaped = builder.constant(f"{name}.bias", bias.reshape(-1, *[1] * (layer.weight.dim() - 2)))
        value = builder.node("Add", [value, shaped], f"{name}.biased")
    if isinstance(layer.output_quantizer, Quantizer):
        return apply_wish(builder, Wish(f"{name}.output", layer.output_quantizer), value)
    if layer.output_quantizer is None or norm is not None:
        return value
    return emit(builder, f"{name}.output", layer.output_quantizer, [value])


def _integer_bias(
    builder: GraphBuilder, name: str, layer: QuantLayer, weight: IntegerWeight, value: str
) -> tuple[IntegerWeight, Tensor, Tensor] | None:
    """Weight, and codes and scale of the bias, where input, weight, bias and output of a layer are all integers."""
    wish = builder.placement.wishes.get(name)
    if isinstance(layer.output_quantizer, Quantizer):
        wish = Wish(f"{name}.output", layer.output_quantizer)
    form = movable_form(wish) if wish else None
    integers = builder.integers[value].step if value in builder.integers else None
    found = weight.with_integer_bias(integers) if integers and form else None
    if found is None or form is None or weight.bias is None:
        return None
    _, codes, unit = found
    builder.integer_biases[name] = codes * unit
    error = float((builder.integer_biases[name] - weight.bias).abs().max())
    return found if error <= BIAS_TOLERANCE * form.scale else None


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv(builder: GraphBuilder, name: str, layer: nn.Conv2d, inputs: list[str]) -> str:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"{name}: padding={layer.padding!r} ({layer.padding_mode}); use zeros and a number of pixels")
    return _operation(
        builder,
        "Conv",
        name,
        layer,
        inputs[0],
        strides=list(layer.stride),
        pads=list(layer.padding) * 2,
        dilations=list(layer.dilation),
        group=layer.groups,
        kernel_shape=list(layer.kernel_size),
    )


def _linear(builder: GraphBuilder, name: str, layer: nn.Linear, inputs: list[str]) -> str:
    return _operation(builder, "Gemm", name, layer, inputs[0], transB=1)


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


def _bias_prelu(builder: GraphBuilder, name: str, module: BiasPReLU, inputs: list[str]) -> str:
    parts = {"bias": module.bias, "slope": module.slope, "shift": module.shift}
    bias, slope, shift = (builder.constant(f"{name}.{key}", part.view(-1, 1, 1)) for key, part in parts.items())
    value = builder.node("Add", [*inputs, bias], f"{name}.biased")
    value = builder.node("PRelu", [value, slope], name)
    return builder.node("Add", [value, shift], f"{name}.shifted")


def _moving(builder: GraphBuilder, name: str, value: str, move: Callable[[str, str], str]) -> str:
    """``move(value, zero)``; on the codes behind the value where there are any, with their zero point for zero."""
    codes = builder.integers.get(value)
    if codes is None:
        return move(value, "")
    return builder.dequantize(replace(codes, codes=move(codes.codes, codes.zero_point)), f"{name}.values")


def _pad_shortcut(builder: GraphBuilder, name: str, module: PadShortcut, inputs: list[str]) -> str:
    def move(value: str, zero: str) -> str:
        if module.stride != 1:
            limits = {"starts": [0, 0], "ends": [END, END], "axes": [2, 3], "steps": [module.stride] * 2}
            slices = [builder.constant(f"{name}.{key}", numbers, np.int64) for key, numbers in limits.items()]
            value = builder.node("Slice", [value, *slices], f"{name}.pixels")
        pads = builder.constant(f"{name}.pads", [0, module.padding, 0, 0, 0, module.padding, 0, 0], np.int64)
        return builder.node("Pad", [value, pads, zero] if zero else [value, pads], name)

    return _moving(builder, name, inputs[0], move)


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
        shape["dilations"] = _pair(module.dilation)
        return _moving(builder, name, inputs[0], lambda value, _: builder.node("MaxPool", [value], name, **shape))
    if module.divisor_override is not None or module.ceil_mode:
        raise ValueError(f"{name}: AvgPool2d with divisor_override or ceil_mode has no ONNX form here")
    return builder.node("AveragePool", inputs, name, count_include_pad=int(module.count_include_pad), **shape)


def _flatten(builder: GraphBuilder, name: str, module: nn.Flatten, inputs: list[str]) -> str:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"{name}: Flatten({module.start_dim}, {module.end_dim}) has no ONNX form here; use Flatten(1)")
    return _moving(builder, name, inputs[0], lambda value, _: builder.node("Flatten", [value], name, axis=1))


def _output_scale(builder: GraphBuilder, name: str, module: OutputScale, inputs: list[str]) -> str:
    return builder.node("Mul", [*inputs, builder.constant(f"{name}.scale", module.output_scale.abs())], name)


def _quant_output(builder: GraphBuilder, name: str, module: QuantOutput, inputs: list[str]) -> str:
    value = emit(builder, name, module.module, inputs)
    return apply_wish(builder, Wish(f"{name}.output", module.output_quantizer), value)


EMITTERS: dict[type[nn.Module], Emitter] = {
    nn.Conv2d: _conv,
    QuantConv2d: _conv,
    nn.Linear: _linear,
    QuantLinear: _linear,
    QuantOutput: _quant_output,
    OutputScale: _output_scale,
    nn.BatchNorm2d: _batchnorm,
    nn.ReLU: lambda builder, name, module, inputs: builder.node("Relu", inputs, name),
    nn.ReLU6: _clip(0.0, 6.0),
    nn.Hardtanh: _hardtanh,
    BiasPReLU: _bias_prelu,
    Add: lambda builder, name, module, inputs: builder.node("Add", inputs, name),
    PadShortcut: _pad_shortcut,
    nn.AdaptiveAvgPool2d: _global_average,
    nn.AvgPool2d: _pool,
    nn.MaxPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Dropout: lambda builder, name, module, inputs: inputs[0],
    nn.Identity: lambda builder, name, module, inputs: inputs[0],
}
