"""New widths in the middle of training, with ranges that fit them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from callbacks.bmpq.max_scale import MaxScale
from research.quant.allocation import Allocation
from research.quant.conv_bn import QuantConvBn2d
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers import Quantizer
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax
from research.quant.quantizers.pact import PACT

WEIGHTS = (LSQ, MinMax, MaxScale)
INPUTS = (LSQ, MinMax, PACT)


def require_uniform(name: str, layer: QuantLayer) -> None:
    """Raise ValueError unless the weight's codes are integers times a scale, and both ranges can follow a new width."""
    if isinstance(layer, QuantConvBn2d):
        raise ValueError(
            f"callbacks.bmpq: the gradient of {name} is not that of its quantized weight, which holds a batch-norm; "
            "use quantizer.fold_bn=none"
        )
    slots = (
        ("weight", layer.weight_quantizer, WEIGHTS, "lsq, minmax or callbacks.bmpq.MaxScale"),
        ("input", layer.input_quantizer, INPUTS, "lsq, minmax or pact"),
    )
    for slot, quantizer, known, names in slots:
        if quantizer is not None and (not isinstance(quantizer, known) or quantizer.midrise):
            raise ValueError(
                f"callbacks.bmpq: quantizer.{slot}.name={quantizer.spec.name} of {name} has no uniform grid whose "
                f"range could follow a new width; use {names}"
            )


def weight_scale(layer: QuantLayer) -> Tensor:
    """The scale that the layer's weight is quantized with at present; no gradient."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    return quantizer.scale_of(layer.weight) if isinstance(quantizer, MaxScale) else quantizer.scale.detach()


@torch.no_grad()
def change_widths(net: nn.Module, allocation: Allocation) -> int:
    """Give ``net`` these widths and fitting ranges, in place; the number of layers that changed.

    Ranges of weights are initialised anew from the weights. A trained step of an input is multiplied by
    ``sqrt(qmax_before / qmax_after)``, as LSQ's initialisation depends on the width; a clip or a range of an input
    stays. No data is needed, so that all processes do the same.
    """
    before = Allocation.of(net)
    changed = [(name, layer) for name, layer in quant_layers(net) if before[name] != allocation[name]]
    steps = {layer: layer.input_quantizer.limits()[1] for _, layer in changed if layer.input_quantizer is not None}
    allocation.apply(net)
    for name, layer in changed:
        if layer.weight_quantizer is not None and before[name].weight != allocation[name].weight:
            layer.weight_quantizer.initialise(layer.float_weight())
        if layer in steps:
            _rescale(layer.input_quantizer, steps[layer])
    return len(changed)


def _rescale(quantizer: Quantizer | None, qmax_before: Tensor) -> None:
    if isinstance(quantizer, LSQ):
        quantizer.raw_scale.mul_((qmax_before / quantizer.limits()[1]).sqrt())
