"""The deployed form: a copy of a finalised network whose weights are integer codes, at one width.

Artifact and ONNX graph are two notations of this one network, so they cannot disagree.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from research.quant.conv_bn import merge_batchnorm
from research.quant.grid import Grid
from research.quant.layers import QuantLayer, quant_layers, replace_module
from research.quant.quantizers import Quantizer, QuantizerSpec
from research.quant.widths import PerWidth, SwitchableBatchNorm2d


class DeployedWeight(Quantizer):
    """A weight as fixed codes on a grid; what is quantized is ignored.

    Args:
        spec: specification of the quantizer that made the codes.
        grid: what the codes mean.
        bits: width, scalar or per channel.
        codes: integers, shape of the weight.
        scale: scale or codebook of the grid.
        zero_point: zero point, or None.
    """

    stored_codes: Tensor
    stored_scale: Tensor
    stored_zero_point: Tensor | None

    def __init__(
        self, spec: QuantizerSpec, grid: Grid, bits: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None
    ) -> None:
        super().__init__(spec, codes.shape, 0, "weight")
        self.bits = bits
        self.signed.fill_(grid.signed)
        self.initialised.fill_(True)
        self._grid = grid
        qmin, qmax = self.integer_limits()
        self.register_buffer("stored_codes", codes.to(torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16))
        self.register_buffer("stored_scale", scale)
        self.register_buffer("stored_zero_point", zero_point)

    @classmethod
    def of(cls, quantizer: Quantizer, codes: Tensor) -> DeployedWeight:
        """``codes`` with the grid, width, scale and zero point that ``quantizer`` has now, on their device."""
        zero_point = quantizer.zero_point
        return cls(
            quantizer.spec,
            quantizer.grid,
            quantizer.bits.detach().clone(),
            codes,
            quantizer.scale.detach().clone(),
            None if zero_point is None else zero_point.detach().clone(),
        ).to(codes.device)

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        return self._grid

    def integer_limits(self) -> tuple[int, int]:
        """Least and greatest code of all channels."""
        qmin, qmax = self.limits()
        return int(qmin.min()), int(qmax.max())

    def limits(self) -> tuple[Tensor, Tensor]:
        """``(qmin, qmax)`` of the grid at the stored width."""
        return self._grid.limits(self.bits)

    @property
    def scale(self) -> Tensor:
        """The stored scale, or the codebook."""
        return self.stored_scale

    @property
    def zero_point(self) -> Tensor | None:
        """The stored zero point."""
        return self.stored_zero_point

    def transform(self, x: Tensor) -> Tensor:
        """The stored codes in the scale's type, whatever ``x`` is."""
        return self.stored_codes.to(self.stored_scale.dtype)

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Nothing is left to round."""
        return transformed

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of ``codes`` on the grid."""
        return self._grid.values(codes, self.stored_scale, self.stored_zero_point)

    def initialise(self, x: Tensor) -> None:
        """Refused: deployed weights do not depend on data."""
        raise ValueError("a deployed network is not calibrated: calibrate the network that it was made from")


@torch.no_grad()
def deployed(net: nn.Module) -> nn.Module:
    """The deployed form of a finalised network: a copy in evaluation mode; ``net`` stays as it is.

    Every quantized weight becomes a `DeployedWeight`, folded batch-norms are merged into their convolutions, and state
    per width is reduced to the selected width. The outputs are bitwise those of ``net.eval()``.

    Raises:
        ValueError: a layer whose weight is not exactly the values of its quantizer's codes.
    """
    net = copy.deepcopy(net).eval()
    _select_width(net)
    merge_batchnorm(net)
    for name, layer in quant_layers(net):
        if layer.weight_quantizer is not None:
            install(layer, _fixed(name, layer, layer.weight_quantizer))
    return net


def deployed_weights(net: nn.Module) -> dict[str, tuple[QuantLayer, DeployedWeight]]:
    """Layers with a deployed weight, and that weight, by layer name."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in quant_layers(net)
        if isinstance(layer.weight_quantizer, DeployedWeight)
    }


@torch.no_grad()
def install(layer: QuantLayer, weight: DeployedWeight) -> None:
    """Give ``layer`` a deployed weight; its latent weight becomes the de-quantized one, without gradient.

    Raises:
        ValueError: another shape than the layer's.
    """
    if weight.shape != layer.weight.shape:
        raise ValueError(f"codes of shape {tuple(weight.shape)} for a weight of shape {tuple(layer.weight.shape)}")
    layer.weight_quantizer = weight
    layer.weight_override = None
    layer.weight = nn.Parameter(weight(layer.weight), requires_grad=False)


def _select_width(net: nn.Module) -> None:
    for name, module in list(net.named_modules()):
        if isinstance(module, PerWidth):
            replace_module(net, name, module.present)
        elif isinstance(module, SwitchableBatchNorm2d):
            replace_module(net, name, module.by_width[module.selected])


def _fixed(name: str, layer: QuantLayer, quantizer: Quantizer) -> DeployedWeight:
    """The fixed codes of a layer, proven to give its quantized weight bit for bit."""
    codes = quantizer.codes(layer.float_weight())  # first: the scale of some quantizers follows from the weight
    fixed = DeployedWeight.of(quantizer, codes)
    if not torch.equal(fixed(layer.weight), layer.quantized_weight()):
        raise ValueError(
            f"{name}: its weight is not what the codes of its {type(quantizer).__name__} stand for (a mode other than "
            "quantize, a weight_override or a weight_offset at work?); finalise the network before deploying it"
        )
    return fixed
