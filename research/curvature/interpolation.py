"""The straight line between two trained networks of one architecture, and beyond both (Goodfellow, Vinyals, Saxe,
ICLR 2015, arXiv 1412.6544).

Surface: ``perturbation``. Two *levels*. At ``latent`` the latent weights are interpolated and then quantized, by ranges
that are interpolated too: every point is a quantized network. At ``quantized`` the de-quantized weights are
interpolated: only the ends are quantized networks, activations are quantized everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from research.curvature.progress import progress
from research.learning.finalise import measure
from research.learning.tasks import Task
from research.models.checkpoint import COUNTER, first_difference
from research.quant.conv_bn import merge_batchnorm
from research.quant.kinds import RANGES, parameter_kinds
from research.quant.layers import quant_layers

Level = Literal["latent", "quantized"]
LEVELS: tuple[Level, ...] = get_args(Level)


@torch.no_grad()
def dequantized(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are its quantized ones, without weight quantizers."""
    net = copy.deepcopy(net).eval()
    merge_batchnorm(net)
    for _, layer in quant_layers(net):
        weight = layer.quantized_weight().clone()
        layer.weight_quantizer, layer.weight_override = None, None
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return net


@torch.no_grad()
def interpolated(one: nn.Module, other: nn.Module, t: float) -> nn.Module:
    """The network at ``(1 - t) one + t other``, a copy in evaluation mode; the ends are exact.

    Weights, biases and norm parameters follow the line on both sides. Batch-norm statistics and quantizer ranges must
    stay positive: beyond an end they keep its values.

    Args:
        one: the network at 0.
        other: the network at 1, of the same architecture.
        t: position.

    Raises:
        ValueError: other tensors or shapes, or integer state (widths, signs, fixed codes) that differs.
    """
    net = copy.deepcopy(one).eval()
    start, end = one.state_dict(), other.state_dict()
    if difference := first_difference(start, end):
        raise ValueError(f"other: {difference}; use two runs of one model and quantizer")
    free = {name for name, kind in parameter_kinds(net).items() if kind not in RANGES}
    held = min(max(t, 0.0), 1.0)
    state: dict[str, Tensor] = {}
    for name, tensor in start.items():
        if _discrete(name, tensor):
            if not name.endswith(COUNTER) and not torch.equal(tensor, end[name]):
                raise ValueError(
                    f"other: {name} differs, and nothing lies between: use level=quantized, or runs of equal bits"
                )
            state[name] = tensor
        else:
            place = t if name in free else held
            state[name] = (1 - place) * tensor + place * end[name]
    net.load_state_dict(state)
    return net


def interpolation(
    one: nn.Module,
    other: nn.Module,
    task: Task,
    batches: Sequence[Any],
    along: Sequence[float],
    level: Level = "latent",
) -> list[dict[str, float]]:
    """Loss and metrics along the line; a row ``{t, loss, accuracy, ...}`` for each position. Both networks stay.

    Args:
        one: the network at 0, converted.
        other: the network at 1, of the same architecture.
        task: what measures.
        batches: ``(inputs, targets)`` each.
        along: positions.
        level: what is interpolated.

    Raises:
        ValueError: an unknown level, or networks with nothing between them.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level}: use one of {', '.join(LEVELS)}")
    ends = (one, other) if level == "latent" else (dequantized(one), dequantized(other))
    return [{"t": float(t), **measure(interpolated(*ends, t), task, batches)} for t in progress(along, "interpolation")]


def _discrete(name: str, tensor: Tensor) -> bool:
    """Whether nothing lies between two values: integers, flags and widths."""
    return not tensor.is_floating_point() or name.rpartition(".")[2] == "bits"
