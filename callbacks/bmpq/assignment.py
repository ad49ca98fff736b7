"""From bit gradients to the objective of BMPQ's integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from research.quant.allocation import LayerBits

Assign = Literal["sensitive", "inverted", "random"]
ASSIGNS: tuple[Assign, ...] = get_args(Assign)

Values = dict[str, dict[LayerBits, float]]


def importance(enbg: Tensor, assign: Assign, generator: torch.Generator) -> Tensor:
    """How much each bit of a layer is worth, one number a layer.

    Args:
        enbg: normalised bit gradients averaged over an interval, (layers,), 0 or more.
        assign: ``sensitive``: ``enbg`` divided by its sum, which changes no decision; the two controls are
            ``inverted`` (mirrored: ``max + min - enbg``, the most sensitive layer becomes the least) and ``random``.
        generator: what ``random`` draws from.
    """
    if assign == "random":
        return torch.rand(len(enbg), generator=generator, dtype=torch.float64)
    values = enbg.double().cpu()
    if assign == "inverted":
        values = values.amax() + values.amin() - values
    total = values.sum()
    return values / total if total > 0 else values


def bit_values(importances: Mapping[str, float], choices: Mapping[str, Sequence[LayerBits]]) -> Values:
    """What the integer programme makes small: ``-importance_l q`` for a layer at q bits; 0 where nothing is chosen.

    Args:
        importances: of the layers whose widths are chosen.
        choices: candidates of all layers.
    """
    return {
        name: {bits: -importances.get(name, 0.0) * bits.weight for bits in options} for name, options in choices.items()
    }
