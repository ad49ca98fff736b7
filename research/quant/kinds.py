"""Kinds of parameters: what each parameter of a converted network is, for methods that treat them differently."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from research.quant.layers import quant_layers, quantizers
from research.quant.quantizers import Quantizer

Kind = Literal["weight", "bias", "norm_weight", "norm_bias", "weight_range", "input_range", "choice", "other"]
BIASES: tuple[Kind, ...] = ("bias", "norm_bias")
RANGES: tuple[Kind, ...] = ("weight_range", "input_range", "choice")


def parameter_kinds(net: nn.Module) -> dict[str, Kind]:
    """The kind of every parameter of ``net`` by its name.

    ``weight`` and ``bias`` of the layers that ``convert`` made; ``norm_weight`` and ``norm_bias`` of batch-norms;
    ``weight_range``: what weight quantizers learn; ``input_range``: what quantizers of inputs and outputs learn;
    ``choice``: what of these chooses a width (`Quantizer.choice_parameters`); else ``other``.
    """
    kinds: dict[nn.Parameter, Kind] = {}
    for _, layer in quant_layers(net):
        if isinstance(layer.weight, nn.Parameter):
            kinds[layer.weight] = "weight"
        if isinstance(layer.bias, nn.Parameter):
            kinds[layer.bias] = "bias"
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            kinds[module.weight], kinds[module.bias] = "norm_weight", "norm_bias"
    for _, quantizer in quantizers(net):
        for parameter in quantizer.parameters():
            kinds[parameter] = "weight_range" if quantizer.role == "weight" else "input_range"
    for quantizer in (module for module in net.modules() if isinstance(module, Quantizer)):
        kinds |= {getattr(quantizer, name): "choice" for name in quantizer.choice_parameters}
    return {name: kinds.get(parameter, "other") for name, parameter in net.named_parameters()}
