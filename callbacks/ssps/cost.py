"""What a network is expected to cost while its cells are open, and the repair of picks that are beyond a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from research.quant.allocation import LayerBits
from research.quant.budget import Budget, Choices, Counts
from research.quant.cost_table import CostTable


class ExpectedCost(CostTable):
    """Costs at every pair of a weight's and an input's candidate: ``shares`` is (budgets, layers, n, m)."""

    @classmethod
    def of_pairs(
        cls,
        budgets: Sequence[Budget],
        counts: Counts,
        choices: Choices,
        pairs: Mapping[str, Sequence[Sequence[LayerBits]]],
    ) -> ExpectedCost:
        """From the candidates of a network.

        Args:
            budgets: at least one.
            counts: the network's.
            choices: the candidates of all layers.
            pairs: by searched layer n rows of m pairs of its candidates: the same n and m for all.
        """
        flat = {name: [pair for row in rows for pair in row] for name, rows in pairs.items()}
        table = cls.of(budgets, counts, {**choices, **flat}, list(pairs))
        inputs = len(next(iter(pairs.values()))[0])
        return replace(table, shares=table.shares.reshape(*table.shares.shape[:2], -1, inputs))

    def by_layer(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Expected shares ``sum_ij p_i q_j share_ij`` of independent draws, (budgets, layers).

        Args:
            weights: p, probabilities of the weights' candidates, (layers, n).
            inputs: q, those of the inputs, (layers, m).
        """
        return (self.shares * weights[:, :, None] * inputs[:, None, :]).sum((2, 3))

    def ratios(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Expected cost as a part of the budget, (budgets,); of a maximum that of the expected shares; arguments as
        `by_layer`'s."""
        shares = self.by_layer(weights, inputs)
        total, greatest = shares.sum(1) + self.others, torch.maximum(shares.amax(1), self.others)
        return torch.where(self.additive, total, greatest) / self.limits

    def excess(self, weights: Tensor, inputs: Tensor) -> float:
        """By how much all budgets together are exceeded, in parts of them; of a maximum each layer's excess counts."""
        shares = self.by_layer(weights, inputs) / self.limits[:, None]
        total = shares.sum(1) + self.others / self.limits
        return float(torch.where(self.additive, torch.relu(total - 1), torch.relu(shares - 1).sum(1)).sum())


def repaired(
    picks: Mapping[str, int],
    probabilities: Mapping[str, Sequence[float]],
    fits: Callable[[Mapping[str, int]], bool],
    excess: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """``picks``, some of them taken down until they fit: always that one by one candidate which loses the least
    probability per excess that it takes away; of equal ones the first.

    Args:
        picks: index of the candidate by cell, ascending in width.
        probabilities: of the candidates, by cell.
        fits: whether picks are within the budgets; true of the least ones.
        excess: by how much they are not.
    """
    found = dict(picks)
    while not fits(found):
        before, rates = excess(found), {}
        for name, index in found.items():
            if index > 0:
                loss = probabilities[name][index] - probabilities[name][index - 1]
                saved = before - excess({**found, name: index - 1})
                rates[name] = (saved <= 0, loss / saved if saved > 0 else loss)
        found[min(rates, key=lambda name: rates[name])] -= 1
    return found
