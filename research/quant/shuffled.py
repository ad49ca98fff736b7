"""The shuffled allocation: the widths of a found one, given to other layers. Does it matter which layer has which?"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from research.quant.allocation import Allocation
from research.quant.budget import Budget, Counts

TRIES = 1000


def shuffled(
    allocation: Allocation, names: Sequence[str], counts: Counts, budgets: Sequence[Budget], seed: int
) -> Allocation:
    """The first of the shuffles of ``seed`` that differs from ``allocation`` and is within the budgets.

    A layer's widths, of weight and input, stay together. Layers differ in size, so that most shuffles cost something
    else than ``allocation`` does.

    Args:
        allocation: the found one.
        names: the layers among which widths are exchanged; the others keep theirs.
        counts: the network's.
        budgets: at least one.
        seed: of the shuffles.

    Raises:
        ValueError: all these layers have the same widths, or none of many shuffles is within the budgets.
    """
    widths = [allocation[name] for name in names]
    if len(set(widths)) < 2:
        raise ValueError("table=: all layers that could be exchanged have the same widths; use a mixed allocation")
    generator = random.Random(seed)
    least = [math.inf] * len(budgets)
    for _ in range(TRIES):
        generator.shuffle(widths)
        found = Allocation({**allocation, **dict(zip(names, widths, strict=True))})
        costs = [budget.cost(counts, found) for budget in budgets]
        if found != allocation:
            if all(cost <= budget.value for cost, budget in zip(costs, budgets, strict=True)):
                return found
            least = [min(pair) for pair in zip(least, costs, strict=True)]
    shown = ", ".join(
        f"{b.key}.value={b.value:.12g} (at least {cost:.6g})" for b, cost in zip(budgets, least, strict=True)
    )
    raise ValueError(f"none of {TRIES} shuffles of the widths is within {shown}; use a larger budget")
