"""From the gates of all layers to widths within a budget: what the penalty compares, and which planes stay at last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from callbacks.csq.planes import span_of, width_of
from research.quant.cost_table import CostTable


def span_excess(table: CostTable, spans: Tensor) -> Tensor:
    """``R - R_t``, both in units of the cost with all planes, 0-dim; of several budgets the one met the least.

    With one budget of ``average_bits`` it is ``(sum_l N_l b_l / sum_l N_l - target) / (N + 1)`` for layers that all
    have gates: a reconstruction of the abstract's model size.

    Args:
        table: of budgets of weights; a layer's candidates are its widths by span, from 0 to N.
        spans: of the layers, integers (L,).
    """
    index = spans.reshape(1, -1, 1).expand(len(table.shares), -1, 1)
    cost = table.shares.gather(2, index).sum((1, 2)) + table.others
    widest = table.shares[..., -1].sum(1) + table.others
    return ((cost - table.limits) / widest).amax()


def gate_excess(opened: Tensor, target: float) -> Tensor:
    """``R - R_t`` with R the share of open gates, every layer alike (official code), 0-dim.

    Args:
        opened: which gates are open, boolean (L, N).
        target: planes a layer.
    """
    return opened.double().mean() - target / opened.shape[1]


def gate_penalty(gates: Tensor, beta: Tensor, excess: Tensor, strength: float) -> Tensor:
    """``lambda (R - R_t) sum |h(m)|`` (official code), 0-dim; R is a number, no gradient flows through it.

    Args:
        gates: m of all layers, (L, N).
        beta: inverse temperature, 0-dim.
        excess: ``R - R_t``, 0-dim.
        strength: lambda.
    """
    return strength * excess.detach().to(gates.dtype) * torch.sigmoid(beta * gates).sum()


def settled(
    gates: Mapping[str, Sequence[float]], least: int, fits: Callable[[Mapping[str, int]], bool]
) -> dict[str, list[bool]]:
    """Which planes stay, by layer: those with ``m > 0``, and fewer where these are not within the budget.

    The official code ends wherever the penalty has led to. Here, while the widths do not fit, that one of the first and
    last open planes of all layers is closed whose gate is the least: closing one between two open ones saves nothing.

    Args:
        gates: m by layer.
        least: 1: open the plane with the greatest gate where a layer has no other, never close a layer's last; or 0.
        fits: whether widths, by layer, are within the budgets; true of the least ones.
    """
    opened = {name: [value > 0 for value in values] for name, values in gates.items()}
    if least:
        for name, values in gates.items():
            if not any(opened[name]):
                opened[name][max(range(len(values)), key=values.__getitem__)] = True
    while not fits({name: width_of(span_of(chosen)) for name, chosen in opened.items()}):
        ends = [
            (gates[name][plane], name, plane)
            for name, chosen in opened.items()
            if sum(chosen) > least
            for plane in (chosen.index(True), len(chosen) - 1 - chosen[::-1].index(True))
        ]
        _, name, plane = min(ends)
        opened[name][plane] = False
    return opened
