"""Biases as integers: the last step that makes a network one of integers from end to end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from research.deploy.onnx import build_graph
from research.deploy.weights import bias_of
from research.quant.layers import quant_layers


@torch.no_grad()
def round_biases(net: nn.Module, example: Tensor) -> dict[str, float]:
    """Move the biases of a finalised network, in place, to multiples of the unit in which integer kernels add.

    The unit of a channel is the scale of the input codes times the scale of the weight codes. Only biases of layers
    between two quantizers move (such as those of folded batch-norms under ``quantizer=lsq_deploy``), by half a unit at
    most; with 8-bit weights that is far below one step of the quantizer behind. It belongs before the final test, so
    that what is measured is what runs. A second call changes nothing.

    Args:
        net: a finalised network, its batch-norms merged.
        example: a batch of inputs; only its shape matters.

    Returns:
        By layer, the largest change of a bias.

    Raises:
        ValueError: a network that has no form in ONNX.
    """
    _, builder = build_graph(net, example)
    moved = {}
    for name, layer in quant_layers(net):
        bias = bias_of(layer)
        if bias is not None and name in builder.integer_biases and name not in builder.placement.norms:
            before = bias.clone()
            bias.copy_(builder.integer_biases[name])
            moved[name] = float((bias - before).abs().max())
    return moved
