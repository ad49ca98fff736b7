"""Conversion: a float network and a recipe become a quantized network and its resolved table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from research.quant.conv_bn import fold_into_quant
from research.quant.layers import SOURCES, QuantLayer, QuantOutput, replace_module
from research.quant.output_scale import OutputScale
from research.quant.quantizers import Quantizer, QuantizerSpec, Role, build_quantizer
from research.quant.recipe import Recipe, Table, make_spec
from research.quant.widths import PerWidth, SwitchableBatchNorm2d


def convert(
    net: nn.Module,
    recipe: Recipe,
    first: str,
    last: str,
    build_module: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    conv_bn: Sequence[tuple[str, str]] = (),
) -> Table:
    """Replace the convolutions and linear layers of ``net`` in place by quantized ones, by the recipe.

    Neither data nor files are read; every parameter and buffer has its final shape afterwards. Parameter names of the
    float network stay as they are, except with ``fold_bn: 0``, which folds the present values for good.

    Args:
        net: a float network.
        recipe: what goes where.
        first: name of the first quantizable layer (``@first`` in rules).
        last: name of the last one (``@last``).
        build_module: makes a module from ``{_target_: ...}``; needed for ``recipe.replace`` only.
        conv_bn: names of (convolution, batch-norm) pairs; needed for ``recipe.fold_bn`` only.

    Returns:
        The resolved table: layer name -> slot -> specification, in order of definition.

    Raises:
        ValueError: a recipe that does not fit the network.
    """
    _replace_modules(net, recipe, build_module)
    sources = {name: module for name, module in net.named_modules() if type(module) in SOURCES}
    table = recipe.resolve(list(sources), first, last)
    make = partial(_make, recipe)
    for name, source in sources.items():
        layer = SOURCES[type(source)](source)
        fill_slots(layer, table[name], make)
        replace_module(net, name, layer)
    if recipe.fold_bn is not None:
        fold_into_quant(net, conv_bn, recipe.fold_bn)
    _quantize_outputs(net, recipe)
    if recipe.widths:
        _switch_batchnorms(net, recipe)
    return table


def fill_slots(
    layer: QuantLayer, specs: Mapping[str, QuantizerSpec | None], make: Callable[..., Quantizer] = build_quantizer
) -> None:
    """Give a layer without quantizers those of ``specs``, by slot.

    Args:
        layer: the layer.
        specs: ``weight``, ``input`` and ``output``.
        make: makes a quantizer of specification, shape, channel axis and role.
    """
    shape = tuple(layer.weight.shape)
    if (spec := specs["weight"]) is not None:
        layer.weight_quantizer = make(spec, shape, layer.channel_axis, "weight")
        if layer.weight_quantizer.owns_weight:
            layer.weight.requires_grad_(False)
    if (spec := specs["input"]) is not None:
        layer.input_quantizer = make(spec, (), None, "input")
    if (spec := specs["output"]) is not None:
        layer.output_quantizer = make(spec, (), None, "output")
    elif any(q is not None and q.output_scale for q in (layer.weight_quantizer, layer.input_quantizer)):
        layer.output_quantizer = OutputScale()


def _make(
    recipe: Recipe, spec: QuantizerSpec, shape: tuple[int, ...], channel_axis: int | None, role: Role
) -> Quantizer:
    if recipe.widths and spec.bits in recipe.widths:
        return PerWidth(spec, shape, channel_axis, role, recipe.widths)
    return build_quantizer(spec, shape, channel_axis, role)


def _parameter_free(net: nn.Module, match: str, key: str) -> list[str]:
    """Names of the parameter-free leaf modules that ``match`` matches as a whole."""
    names = [
        name
        for name, module in net.named_modules()
        if name and not list(module.children()) and not list(module.parameters()) and re.fullmatch(match, name)
    ]
    if not names:
        raise ValueError(f"{key}.match={match!r} matches no activation or residual add: see print(model) for names")
    return names


def _replace_modules(
    net: nn.Module, recipe: Recipe, build_module: Callable[[Mapping[str, Any]], nn.Module] | None
) -> None:
    for index, (match, target) in enumerate(recipe.replace):
        assert build_module is not None, "recipe.replace needs build_module"
        for name in _parameter_free(net, match, f"quantizer.replace[{index}]"):
            module = build_module(target)
            if not isinstance(module, nn.Module):
                raise ValueError(f"quantizer.replace[{index}].module._target_={target['_target_']}: use an nn.Module")
            replace_module(net, name, module)


def _quantize_outputs(net: nn.Module, recipe: Recipe) -> None:
    for index, rule in enumerate(recipe.outputs):
        key = f"quantizer.outputs[{index}]"
        spec = make_spec(rule.settings["output"], f"{key}.quantizer")
        if spec is None:
            raise ValueError(f"{key}.quantizer: name a quantizer with bits below 32, or leave the entry out")
        for name in _parameter_free(net, rule.match, key):
            replace_module(net, name, QuantOutput(net.get_submodule(name), _make(recipe, spec, (), None, "output")))


def _switch_batchnorms(net: nn.Module, recipe: Recipe) -> None:
    default = [
        settings["bits"]
        for settings in (recipe.weight, recipe.input)
        if settings and settings.get("bits") in recipe.widths
    ]
    if not default:
        raise ValueError(f"quantizer.widths={list(recipe.widths)}: quantizer.bits must be one of them")
    for name, module in list(net.named_modules()):
        if type(module) is nn.BatchNorm2d:
            replace_module(net, name, SwitchableBatchNorm2d(module, recipe.widths, default[0]))
