"""Post-training quantization of weights alone: no data, no fine-tuning; everything else of the network stays float."""

from __future__ import annotations

import copy

from torch import nn

from research.quant.calibrate import calibrate
from research.quant.layers import quant_layers, quantizers
from research.quant.quantizers import QuantizerSpec, build_quantizer

RANGES = ("minmax", "mse")
WIDTHS = range(2, 9)


def quantized_copy(net: nn.Module, bits: int, init: str = "minmax") -> nn.Module:
    """A copy of a float network with the weights of all convolutions and linear layers on a uniform grid.

    Per tensor and symmetric: ``s * round(clip(W / s, -n, n))``, ``n = 2^(b-1) - 1``, half to even. ``minmax``:
    ``s = max|W| / n``, so that nothing is clipped; ``mse``: the ``s`` of least squared error. Inputs, biases and
    batch-norms stay float.

    Args:
        net: a network converted without quantizers; it stays as it is.
        bits: width ``b``, one of ``WIDTHS``.
        init: one of ``RANGES``.

    Raises:
        ValueError: a network with quantizers, or a width or range that is not offered.
    """
    if bits not in WIDTHS:
        raise ValueError(f"ptq={bits}: use widths from {WIDTHS[0]} to {WIDTHS[-1]}, such as ptq=[8,7,6,5,4,3]")
    if init not in RANGES:
        raise ValueError(f"ptq_range={init}: use one of {', '.join(RANGES)}")
    taken = [name for name, _ in quantizers(net)]
    if taken:
        raise ValueError(f"ptq={bits}: {taken[0]} quantizes this network already; use a run with quantizer=float")
    net = copy.deepcopy(net)
    spec = QuantizerSpec("minmax", bits, signed=True, narrow=True, init=init)
    for _, layer in quant_layers(net):
        layer.weight_quantizer = build_quantizer(spec, tuple(layer.weight.shape), layer.channel_axis, "weight")
    calibrate(net, batches=())
    return net.eval()
