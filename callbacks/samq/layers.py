"""The searched layers: which of them follow another's width, and the modules of all widths in their places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from callbacks.samq.switched import SwitchedBatchNorm2d, SwitchedQuantizer
from research.models.structure import FloatModel
from research.quant.conv_bn import QuantConvBn2d
from research.quant.layers import QuantLayer, replace_module
from research.quant.quantizers.dorefa import DoReFa
from research.quant.quantizers.liq import LIQ
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax

SEARCHED = (LSQ, MinMax, DoReFa, LIQ)
Switched = SwitchedQuantizer | SwitchedBatchNorm2d


def require_switchable(name: str, layer: QuantLayer) -> None:
    """Raise ValueError unless the quantizers of a layer can have several widths, each with a range of its own."""
    if isinstance(layer, QuantConvBn2d):
        raise ValueError(f"callbacks.samq: {name} has its batch-norm folded in; use quantizer.fold_bn=none")
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None and not isinstance(quantizer, SEARCHED):
            raise ValueError(
                f"callbacks.samq: {name} has the {quantizer.role} quantizer {type(quantizer).__name__}; use lsq, "
                "lsq_plus, liq, minmax, dorefa or pact, and quantizer.widths=[]"
            )


def leaders(net: FloatModel, names: Sequence[str]) -> dict[str, str]:
    """For the convolutions in shortcuts, the layer whose width they copy: the last other one of their block.

    Args:
        net: the network.
        names: the searched layers.
    """
    found: dict[str, str] = {}
    for block in net.structure().blocks:
        inside = [name for name in names if name.startswith(f"{block}.")]
        shortcuts = [name for name in inside if name.startswith(f"{block}.downsample.")]
        others = [name for name in inside if name not in shortcuts]
        if others:
            found |= dict.fromkeys(shortcuts, others[-1])
    return found


def switch(net: FloatModel, name: str, layer: QuantLayer, bits: Sequence[int]) -> list[Switched]:
    """Put modules of all widths in the place of a layer's quantizers and of the batch-norm that reads it alone."""
    found: dict[str, Switched] = {}
    for slot in ("weight_quantizer", "input_quantizer"):
        quantizer = getattr(layer, slot)
        if quantizer is not None:
            found[f"{name}.{slot}"] = SwitchedQuantizer(quantizer, bits)
    for conv, norm_name in net.structure().conv_bn:
        norm = net.get_submodule(norm_name)
        if conv == name and isinstance(norm, nn.BatchNorm2d):
            found[norm_name] = SwitchedBatchNorm2d(norm, bits)
    for place, switched in found.items():
        replace_module(net, place, switched)
    return list(found.values())
