"""Cost of a quantized network: multiply-accumulates, BOPs, model size, activation memory, each by a stated convention.

Bits are tensors, hard or expected, so that every cost of this file is differentiable in them and can stand in a loss.
The work is three steps: ``measure`` a network once, ``apply_convention``, and feed the layers to the formulas. The same
network gets BOPs up to 3.8 times apart under different conventions, so no number should travel without its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from research.quant.cost_convention import CostConvention, Form
from research.quant.passes import evaluating, passes
from research.quant.quantizers import Quantizer
from research.quant.widths import SwitchableBatchNorm2d

FLOAT_BITS = 32
NOTHING = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class LayerCost:
    """Counts of one convolution or linear layer for one sample.

    Attributes:
        name: the layer's name.
        weights: number of weights ``N``, without the bias.
        macs: multiply-accumulates ``M``.
        inputs, outputs: elements of the input ``I`` and of the output ``O``.
        fan_in: weights that feed one output element.
        biases: number of biases.
        ranges: number of scales and zero points of the weight quantizer.
        weight_bits, input_bits: float32 tensors, () or, with bits per channel, (channels,); 0 is a pruned layer and
            32 no quantizer. ``input_bits`` is the width of the layer's *input*.
    """

    name: str
    weights: int
    macs: int
    inputs: int
    outputs: int
    fan_in: int
    biases: int
    ranges: int
    weight_bits: Tensor
    input_bits: Tensor

    def with_bits(self, bits: int) -> LayerCost:
        """The layer with weights and input at ``bits``."""
        return replace(
            self,
            weight_bits=torch.full_like(self.weight_bits, float(bits)),
            input_bits=torch.full_like(self.input_bits, float(bits)),
        )


Layers = Sequence[LayerCost]


@torch.no_grad()
def count(net: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Input and output elements of every convolution and linear layer, by one forward pass of one zero sample.

    The network runs in evaluation mode with its quantizers off; nothing in it moves. A layer that the pass does not
    reach counts nothing. ``input_shape`` is that of one sample, (C, H, W).
    """
    elements = {name: (0, 0) for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    handles = []
    for name in elements:

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            read, written = elements[name]
            elements[name] = (read + inputs[0].numel(), written + output.numel())

        handles.append(net.get_submodule(name).register_forward_hook(add))
    parameter = next(net.parameters())
    try:
        with evaluating(net), passes(net, mode="identity"):
            net(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return elements


def measure(net: nn.Module, input_shape: Sequence[int], expected: bool = False) -> tuple[LayerCost, ...]:
    """The cost of every convolution and linear layer of ``net`` (float or converted), in order of definition.

    Args:
        net: the network; its structure decides, not its data.
        input_shape: shape of one sample, (C, H, W), at the real size.
        expected: read ``quantizer.expected_bits``, differentiable in a search, in place of the hard bits. A budget is
            always checked with the hard ones.
    """
    layers = []
    for name, (inputs, outputs) in count(net, input_shape).items():
        layer = net.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        quantizer = getattr(layer, "weight_quantizer", None)
        layers.append(
            LayerCost(
                name=name,
                weights=weight.numel(),
                macs=weight[0].numel() * outputs,
                inputs=inputs,
                outputs=outputs,
                fan_in=weight[0].numel(),
                biases=bias.numel() if isinstance(bias, Tensor) else 0,
                ranges=_ranges(quantizer),
                weight_bits=_bits(quantizer, expected, weight),
                input_bits=_bits(getattr(layer, "input_quantizer", None), expected, weight),
            )
        )
    return tuple(layers)


def _bits(quantizer: Quantizer | None, expected: bool, like: Tensor) -> Tensor:
    if quantizer is None:
        return torch.tensor(float(FLOAT_BITS), device=like.device)
    bits = quantizer.expected_bits if expected else quantizer.bits.detach()
    return bits.float().reshape(-1) if bits.dim() else bits.float()


def _ranges(quantizer: Quantizer | None) -> int:
    if quantizer is None:
        return 0
    return sum(part.numel() for part in (quantizer.scale, quantizer.zero_point) if part is not None)


def apply_convention(layers: Layers, convention: CostConvention, first: str, last: str) -> tuple[LayerCost, ...]:
    """The layers that count, at the bits at which they count.

    Args:
        layers: measured layers.
        convention: what counts how.
        first, last: names of the layer that reads the image and of the one that writes the logits.

    Raises:
        ValueError: no such layer.
    """
    names = [layer.name for layer in layers]
    for name in (first, last):
        if name not in names:
            raise ValueError(f"cost: {name!r} is no convolution or linear layer of the model; there are {names}")
    kept = []
    for layer in layers:
        if convention.shortcut == "excluded" and re.fullmatch(convention.shortcut_names, layer.name):
            continue
        if layer.name in (first, last):
            if convention.first_last == "excluded":
                continue
            if convention.first_last in ("fixed8", "fp"):
                layer = layer.with_bits(8 if convention.first_last == "fixed8" else FLOAT_BITS)
        quantized = (layer.weight_bits > 0) & (layer.weight_bits < FLOAT_BITS)
        if layer.name == first and convention.input_bits is not None and bool(quantized.any()):
            layer = replace(layer, input_bits=torch.full_like(layer.input_bits, float(convention.input_bits)))
        if convention.count_sign_bit:
            layer = replace(layer, weight_bits=layer.weight_bits + quantized)
        kept.append(layer)
    return tuple(kept)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum() if terms else NOTHING


def _mean_bits(bits: Tensor) -> Tensor:
    return bits.double().mean()


def bops(layers: Layers, form: Form = "product") -> Tensor:
    """Bit operations of one sample, a float64 scalar.

    ``product``: ``sum M bw ba`` (the usual form; Bayesian Bits, van Baalen et al. 2020); of two expected widths it is
    the expectation if they are independent. ``uniq``: ``sum M (bw ba + bw + ba + log2 fan_in)``, which counts the
    accumulator too (UNIQ, Baskin et al. 2018). Channels pruned to 0 bits cost nothing in either.
    """
    if form not in get_args(Form):
        raise ValueError(f"cost.form={form}: use one of {', '.join(get_args(Form))}")
    terms = []
    for layer in layers:
        weight_bits, input_bits = layer.weight_bits.double(), _mean_bits(layer.input_bits)
        each = weight_bits * input_bits
        if form == "uniq":
            alive = (weight_bits > 0) & (input_bits > 0)
            each = (each + weight_bits + input_bits + math.log2(layer.fan_in)) * alive
        terms.append(layer.macs * each.mean())
    return _sum(terms)


def relative_bops(layers: Layers, form: Form = "product") -> Tensor:
    """BOPs over those of the same layers at 32 bits."""
    return bops(layers, form) / bops([layer.with_bits(FLOAT_BITS) for layer in layers], form)


def size_bits(layers: Layers, biases: bool = False, ranges: bool = False, norm_parameters: int = 0) -> Tensor:
    """Model size ``sum N bw`` in bits, a float64 scalar; options add 32 bits for each bias, weight scale or zero point,
    and batch-norm parameter (``count_norm_parameters``).
    """
    extra = norm_parameters + sum(biases * layer.biases + ranges * layer.ranges for layer in layers)
    return _sum([layer.weights * _mean_bits(layer.weight_bits) for layer in layers]) + FLOAT_BITS * extra


def count_norm_parameters(net: nn.Module) -> int:
    """Scales and shifts (gamma, beta) of all batch-norms; running statistics fold into them when deployed.

    Of a norm with one copy for each width, one is deployed and counts.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    switchable = [module for module in net.modules() if isinstance(module, SwitchableBatchNorm2d)]
    others = {copy for module in switchable for copy in list(module.by_width.values())[1:]}
    return sum(parameter.numel() for norm in norms if norm not in others for parameter in norm.parameters())


def megabytes(bits: Tensor | float) -> Tensor | float:
    """Bits as decimal megabytes, 10^6 bytes."""
    return bits / 8e6


def kibibytes(bits: Tensor | float) -> Tensor | float:
    """Bits as KiB, 1024 bytes."""
    return bits / 8192


def average_weight_bits(layers: Layers, weighted: bool = True) -> Tensor:
    """``sum N bw / sum N``, what papers mean; or, not ``weighted``, the mean over layers that some scripts log."""
    if not weighted:
        return _sum([_mean_bits(layer.weight_bits) for layer in layers]) / len(layers)
    return size_bits(layers) / sum(layer.weights for layer in layers)


def average_activation_bits(layers: Layers) -> Tensor:
    """``sum I ba / sum I`` over the layers' inputs."""
    return input_memory(layers, "sum") / sum(layer.inputs for layer in layers)


def compression(layers: Layers) -> Tensor:
    """Weight compression against 32 bits, ``32 sum N / sum N bw``."""
    return FLOAT_BITS / average_weight_bits(layers)


def input_memory(layers: Layers, reduction: str = "sum") -> Tensor:
    """Bits of the layers' inputs for one sample: ``sum`` (an input is counted once per layer that reads it) or ``max``,
    the largest single one. The working set is ``activation_memory.peak_memory``.
    """
    terms = [layer.inputs * _mean_bits(layer.input_bits) for layer in layers]
    if reduction not in ("sum", "max"):
        raise ValueError(f"activation memory {reduction!r}: use sum or max")
    return _sum(terms) if reduction == "sum" or not terms else torch.stack(terms).max()
