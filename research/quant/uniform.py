"""The uniform allocation: one width for all layers that are free to choose. What mixed precision has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from research.quant.allocation import Allocation
from research.quant.budget import Budget, Choices, Counts


def uniform(choices: Choices, counts: Counts, budgets: Sequence[Budget]) -> Allocation:
    """The widest allocation within the budgets that gives every layer with several candidates the same one.

    Args:
        choices: candidates; a layer with one of them keeps it.
        counts: the network's.
        budgets: at least one.

    Raises:
        ValueError: no candidate is within a budget, with what is feasible.
    """
    free = [set(options) for options in choices.values() if len(options) > 1]
    fixed = {name: options[0] for name, options in choices.items() if len(options) == 1}
    shared = sorted(set.intersection(*free), reverse=True) if free else []
    found = [Allocation({name: fixed.get(name, bits) for name in choices}) for bits in shared]
    if not free:
        found = [Allocation(fixed)]
    for allocation in found:
        if all(budget.met(counts, allocation) for budget in budgets):
            return allocation
    for budget in budgets:
        costs = [budget.cost(counts, allocation) for allocation in found]
        if costs and min(costs) > budget.value:
            ends = budget.shown(min(costs), max(costs))
            raise ValueError(f"{budget.key}.value={budget.value:.12g}: feasible for one width are {ends}")
    raise ValueError("bits=: the layers have no candidate in common that is within all budgets together")
