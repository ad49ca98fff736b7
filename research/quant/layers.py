"""QuantLayer: a torch layer with slots for everything that quantization-aware training does to it.

The forward pass is fixed, every slot is optional::

    input -> input_quantizer -> op(weight) -> output_quantizer -> output
    weight -> weight_quantizer -> weight_override -> + weight_offset -> op
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from research.quant.fused import WITH_CONVOLUTION, Convolution, fused_quantized_convolution
from research.quant.quantizers.base import Quantizer

SLOTS = ("input_quantizer", "weight_quantizer", "weight_override", "output_quantizer")


def looked_at(module: nn.Module) -> bool:
    """Whether hooks of ``module`` see its inputs or its output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class QuantLayer(nn.Module):
    """Mix-in of the quantized layers; goes before the torch layer in the bases.

    Attributes:
        input_quantizer: quantizer of the layer's input.
        weight_quantizer: quantizer of the latent ``weight``.
        weight_override: one module ``(x_hat, layer) -> x_hat`` that replaces (part of) the quantized weight, such as
            frozen codes. Its owner claims ``codes``.
        weight_offset: tensor of the weight's shape added to the quantized weight. It is a functional leaf, no state:
            the gradient at the quantized weights is the gradient of a zero offset.
        output_quantizer: any module on the layer's output.
    """

    weight: Tensor
    channel_axis = 0
    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer | None
    weight_override: nn.Module | None
    output_quantizer: nn.Module | None
    weight_offset: Tensor | None

    def make_slots(self) -> None:
        """Create the slots, all empty; called once by the concrete layer's constructor."""
        for slot in SLOTS:
            self.register_module(slot, None)
        self.weight_offset = None

    def float_weight(self) -> Tensor:
        """What the weight quantizer quantizes: ``weight``, unless the layer folds something into it."""
        return self.weight

    def quantized_weight(self) -> Tensor:
        """The weight that the operation uses (shape of ``weight``)."""
        return self.quantize_weight(self.float_weight())

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """``weight`` through the weight slots (shape of ``weight``)."""
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        if self.weight_override is not None:
            weight = self.weight_override(weight, self)
        if self.weight_offset is not None:
            weight = weight + self.weight_offset
        return weight

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation on a (quantized) input and weight."""
        raise NotImplementedError

    def quantized_operation(self, x: Tensor) -> Tensor:
        """The operation on the quantized input and weight."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self.operate(x, self.quantized_weight())

    def forward(self, x: Tensor) -> Tensor:
        """Quantize input and weight, operate, quantize the output."""
        y = self.quantized_operation(x)
        return y if self.output_quantizer is None else self.output_quantizer(y)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """``nn.Conv2d`` with slots; takes over the parameters of the layer it replaces."""

    def __init__(self, layer: nn.Conv2d) -> None:
        nn.Conv2d.__init__(
            self,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.make_slots()

    def quantized_operation(self, x: Tensor) -> Tensor:
        """One fused node where the quantizer has the fast path on and nobody looks at what it does."""
        quantizer = self.input_quantizer
        if quantizer is None or quantizer.kernels not in WITH_CONVOLUTION or looked_at(quantizer):
            return super().quantized_operation(x)
        plain = type(self).operate is QuantConv2d.operate and self.padding_mode == "zeros"
        grid = quantizer.fused_grid(x) if plain else None
        if grid is None or isinstance(self.padding, str):
            return super().quantized_operation(x)
        convolution = Convolution(self.stride, self.padding, self.dilation, self.groups)
        return fused_quantized_convolution(
            x, quantizer.raw_scale, self.quantized_weight(), self.bias, grid, convolution, quantizer.kernels
        )

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """2-D convolution, (N, C, H, W) -> (N, C', H', W')."""
        return self.convolve(x, weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with any weight and bias; stride, padding and groups are the layer's."""
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantLinear(QuantLayer, nn.Linear):
    """``nn.Linear`` with slots; takes over the parameters of the layer it replaces."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.make_slots()

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Affine map, (..., in) -> (..., out)."""
        return nn.functional.linear(x, weight, self.bias)


class QuantOutput(nn.Module):
    """A parameter-free module (activation, residual add) with a quantizer on its output."""

    def __init__(self, module: nn.Module, output_quantizer: Quantizer) -> None:
        super().__init__()
        self.module = module
        self.output_quantizer = output_quantizer

    def forward(self, *inputs: Tensor) -> Tensor:
        """``output_quantizer(module(*inputs))``."""
        quantized: Tensor = self.output_quantizer(self.module(*inputs))
        return quantized


SOURCES: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Which quantized layer stands for which torch layer (exact types); ``convert`` replaces these and nothing else."""


def quant_layers(net: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """All quantized layers of ``net`` with their names, in order of definition."""
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def quantizers(net: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of ``net`` with their names, in order of definition; those inside another are its own matter."""
    outer = None
    for name, module in net.named_modules():
        if isinstance(module, Quantizer) and (outer is None or not name.startswith(outer)):
            outer = f"{name}."
            yield name, module


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` stands in ``net``."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


@torch.no_grad()
def quantized_weights(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the quantized weights by layer name: for looking at, never for differentiating."""
    return {name: layer.quantized_weight().clone() for name, layer in quant_layers(net)}
