"""Costs of layers at all of their candidate widths as tensors: searches compare them without reading a number back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from research.quant.budget import Budget, Choices, Counts


@dataclass(frozen=True)
class CostTable:
    """Of every budget, what each candidate of each searched layer adds (or, of a maximum, comes to).

    Attributes:
        shares: (budgets, layers, candidates).
        others: what the other layers add (or the greatest of them), each at its first candidate, (budgets,).
        limits: the most, (budgets,).
        additive: which costs are sums over layers and not maxima, boolean (budgets,).
    """

    shares: Tensor
    others: Tensor
    limits: Tensor
    additive: Tensor

    @classmethod
    def of(cls, budgets: Sequence[Budget], counts: Counts, choices: Choices, layers: Sequence[str]) -> Self:
        """In float64 on the CPU.

        Args:
            budgets: at least one.
            counts: the network's.
            choices: candidates of all layers; as many of each of ``layers``.
            layers: names of the searched layers, in order.
        """
        shares, others = [], []
        for budget in budgets:
            found = budget.shares(counts, choices)
            shares.append([found[name] for name in layers])
            rest = [values[0] for name, values in found.items() if name not in layers]
            others.append(sum(rest) if budget.additive else max(rest, default=0.0))
        limits = [budget.limit(counts) for budget in budgets]
        return cls(
            torch.tensor(shares, dtype=torch.float64),
            torch.tensor(others, dtype=torch.float64),
            torch.tensor(limits, dtype=torch.float64),
            torch.tensor([budget.additive for budget in budgets]),
        )

    def to(self, like: Tensor) -> Self:
        """On the device of ``like``, in its dtype."""
        moved = {name: getattr(self, name).to(like) for name in ("shares", "others", "limits")}
        return replace(self, additive=self.additive.to(like.device), **moved)
