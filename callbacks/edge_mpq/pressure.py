"""What the present widths cost, differentiable in steps and ranges, and how a network is brought within a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from callbacks.edge_mpq.formulas import top_code
from callbacks.edge_mpq.quantizer import StepRange
from research.quant.budget import Budget, Counts
from research.quant.cost import LayerCost
from research.quant.quantizers.base import MAX_BITS


def present_layers(counts: Counts, net: nn.Module, expected: bool = False) -> list[LayerCost]:
    """The layers of ``net`` at the widths that it has now, by channel where they differ by channel.

    Args:
        counts: the network's.
        net: the network, or a copy.
        expected: take ``expected_bits``, which has a gradient, in place of ``bits``; the two are equal.
    """
    found = []
    for layer in counts.layers:
        module = net.get_submodule(layer.name)
        for slot in ("weight", "input"):
            quantizer = getattr(module, f"{slot}_quantizer", None)
            if quantizer is not None:
                bits = quantizer.expected_bits if expected else quantizer.bits
            else:
                bits = getattr(layer, f"{slot}_bits").to(module.weight.device)
            layer = replace(layer, **{f"{slot}_bits": bits.flatten() if bits.ndim else bits})
        found.append(layer)
    return found


def penalty(budgets: Sequence[Budget], counts: Counts, net: nn.Module) -> Tensor:
    """``sum_budgets max(0, cost / budget - 1)^2``, float64 of shape (), with a gradient for steps and ranges.

    The official code squares kilobytes, ``lambda max(0, S - T)^2``: the same with ``lambda T^2`` for a factor. Of
    several equal largest inputs all get a gradient.
    """
    layers = present_layers(counts, net, expected=True)
    costs = torch.stack([budget.cost_of(counts, layers) / budget.value for budget in budgets])
    return torch.relu(costs - 1).square().sum()


@torch.no_grad()
def coarsen_until(quantizers: Sequence[StepRange], fits: Callable[[], bool]) -> None:
    """Make steps coarser until the widths fit: every width goes as low as one common growth of the steps allows.

    The growth is the least that is enough, so that the widths which are lowered are those whose steps need to grow the
    least for it. A reconstruction: the official code takes the best checkpoint that is within its budgets.

    Args:
        quantizers: those that may change.
        fits: whether the widths in their ``bits`` fit; true at the least ones.
    """
    present = [quantizer.bits.clone() for quantizer in quantizers]
    needed = [growths(quantizer) for quantizer in quantizers]

    def widths_at(growth: float) -> list[Tensor]:
        return [
            torch.where((table <= growth) | (widths >= bits[..., None]), widths, MAX_BITS).amin(-1)
            for (widths, table), bits in zip(needed, present, strict=True)
        ]

    def enough(growth: float) -> bool:
        for quantizer, bits in zip(quantizers, widths_at(growth), strict=True):
            quantizer.bits.copy_(bits)
        return fits()

    tables = [table[widths < bits[..., None]] for (widths, table), bits in zip(needed, present, strict=True)]
    levels = sorted(set(torch.cat(tables).tolist()))
    chosen = widths_at(levels[bisect_left(levels, True, key=enough)])
    for quantizer, before, bits in zip(quantizers, present, chosen, strict=True):
        quantizer.bits.copy_(before)
        quantizer.coarsen(bits)


def growths(quantizer: StepRange) -> tuple[Tensor, Tensor]:
    """By what factor a step has to grow for each width: the widths (W,), and factors (..., W), float64."""
    ratio = (quantizer.reach / quantizer.scale).double()
    widths = torch.arange(quantizer.floor, MAX_BITS + 1, device=ratio.device, dtype=ratio.dtype)
    return widths, ratio[..., None] / top_code(widths, quantizer.signed)
