"""Between a deployed network and its description: plain data that rebuild it, and the tensors that go with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from research.deploy.deployed import DeployedWeight, deployed_weights, install
from research.deploy.packing import pack_codes, unpack_codes
from research.models.checkpoint import first_difference
from research.quant.convert import convert
from research.quant.grid import Grid
from research.quant.layers import QuantLayer, QuantOutput, quant_layers, replace_module
from research.quant.output_scale import OutputScale
from research.quant.quantizers import REGISTRY, Quantizer, QuantizerSpec
from research.quant.recipe import SLOT_KEYS, Recipe, Table, make_spec, table_to_plain
from research.targets import find_target, resolve_target

FLAGS = ("bits", "signed", "initialised")


def describe(net: nn.Module, model: Mapping[str, Any], replace: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain containers that, with `tensors_of`, give ``net`` back; the keys are those of ``model.json``.

    Args:
        net: a network in deployed form.
        model: config of the float network.
        replace: ``quantizer.replace`` of the recipe.

    Raises:
        ValueError: a network without quantized layers.
    """
    table: Table = {name: {slot: _spec(layer, slot) for slot in SLOT_KEYS} for name, layer in quant_layers(net)}
    if not table:
        raise ValueError("an artifact needs a quantized network: convert it by a quantizer recipe first")
    outputs: Table = {
        name: {"output": module.output_quantizer.spec}
        for name, module in net.named_modules()
        if isinstance(module, QuantOutput)
    }
    return {
        "model": dict(model),
        "replace": [dict(entry) for entry in replace],
        "table": table_to_plain(table),
        "outputs": [
            {"match": re.escape(name), "quantizer": slots["output"]} for name, slots in table_to_plain(outputs).items()
        ],
        "scales": [name for name, layer in quant_layers(net) if isinstance(layer.output_quantizer, OutputScale)],
        "identities": [name for name, module in net.named_modules() if type(module) is nn.Identity],
        "weights": {name: _packing(weight) for name, (_, weight) in deployed_weights(net).items()},
        "quantizers": {
            name: {"bits": module.bits.tolist(), "signed": bool(module.signed)}
            for name, module in _trained_quantizers(net)
        },
    }


def tensors_of(net: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a deployed network by name: packed codes, scales, zero points, and all others as they are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _plain_state(net).items()}
    for name, (_, weight) in deployed_weights(net).items():
        how = description["weights"][name]
        tensors[f"{name}.weight.codes"] = pack_codes(weight.stored_codes, how["width"], how["qmin"], how["step"])
        tensors[f"{name}.weight.scale"] = weight.stored_scale.cpu().contiguous()
        if weight.stored_zero_point is not None:
            tensors[f"{name}.weight.zero_point"] = weight.stored_zero_point.cpu().contiguous()
    return tensors


@torch.no_grad()
def rebuild(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The deployed network, on the CPU in evaluation mode.

    Raises:
        ValueError: a class outside the allow-list, or tensors that are not those of this network.
        AttributeError, KeyError, TypeError: a description of another form.
    """
    _check_quantizer_names(description)
    net: nn.Module = resolve_target(description["model"], key="model")
    recipe = Recipe.from_config({key: description[key] for key in ("table", "outputs", "replace")})
    convert(net, recipe, first="", last="", build_module=partial(resolve_target, key="replace"))
    layers, found = dict(quant_layers(net)), dict(tensors)
    for name in description["identities"]:
        replace_module(net, name, nn.Identity())
    for name in description["scales"]:
        layers[name].output_quantizer = OutputScale()
    for name, quantizer in _trained_quantizers(net):
        flags = description["quantizers"][name]
        quantizer.bits = torch.tensor(flags["bits"])
        quantizer.signed.fill_(flags["signed"])
        quantizer.initialised.fill_(True)
    for name, layer in layers.items():
        if layer.bias is None and f"{name}.bias" in found:
            layer.bias = nn.Parameter(torch.empty_like(found[f"{name}.bias"]))
    for name, how in description["weights"].items():
        install(layers[name], _weight(name, description["table"][name]["weight"], how, found))
    if difference := first_difference(_plain_state(net), found):
        raise ValueError(f"{difference}: tensors and description are of two networks")
    net.load_state_dict(found, strict=False)
    return net.eval()


def _check_quantizer_names(description: Mapping[str, Any]) -> None:
    """Hold quantizers named by a dotted path to the allow-list before anything of that name is imported."""
    slots = [entry["quantizer"] for entry in description["outputs"]]
    slots += [spec for specs in description["table"].values() for spec in specs.values() if spec is not None]
    for spec in slots:
        if spec["name"] not in REGISTRY:
            find_target(spec["name"], key="table")


def _spec(layer: QuantLayer, slot: str) -> QuantizerSpec | None:
    quantizer = getattr(layer, f"{slot}_quantizer")
    return quantizer.spec if isinstance(quantizer, Quantizer) else None


def _trained_quantizers(net: nn.Module) -> list[tuple[str, Quantizer]]:
    """Quantizers that are not a deployed weight or about to become one."""
    return [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, Quantizer) and module.role != "weight"
    ]


def _packing(weight: DeployedWeight) -> dict[str, Any]:
    """Meaning and packing of a layer's codes."""
    qmin, qmax = weight.integer_limits()
    step = 2 if weight.grid.kind == "midrise" else 1
    return {
        "grid": weight.grid.kind,
        "signed": weight.grid.signed,
        "narrow": weight.grid.narrow,
        "bits": weight.bits.tolist(),
        "shape": list(weight.shape),
        "qmin": qmin,
        "step": step,
        "width": max(1, ((qmax - qmin) // step).bit_length()),
    }


def _weight(name: str, settings: Mapping[str, Any], how: Mapping[str, Any], found: dict[str, Tensor]) -> DeployedWeight:
    """The weight of layer ``name``; takes its tensors out of ``found``."""
    spec = make_spec(settings, f"table.{name}.weight")
    if spec is None:
        raise ValueError(f"weights.{name} has codes, but table.{name}.weight names no quantizer")
    codes = unpack_codes(found.pop(f"{name}.weight.codes"), how["width"], how["qmin"], how["shape"], how["step"])
    return DeployedWeight(
        spec,
        Grid(how["grid"], how["signed"], how["narrow"]),
        torch.tensor(how["bits"]),
        codes,
        found.pop(f"{name}.weight.scale"),
        found.pop(f"{name}.weight.zero_point", None),
    )


def _plain_state(net: nn.Module) -> dict[str, Tensor]:
    """The state that is kept as it is: not weights with codes, flags of quantizers, batch-norm counters."""
    others = set()
    for name, (_, weight) in deployed_weights(net).items():
        others |= {f"{name}.weight"} | {f"{name}.weight_quantizer.{key}" for key in weight.state_dict()}
    for name, module in net.named_modules():
        if isinstance(module, Quantizer):
            others |= {f"{name}.{flag}" for flag in FLAGS}
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            others.add(f"{name}.num_batches_tracked")
    return {name: tensor for name, tensor in net.state_dict().items() if name not in others}
