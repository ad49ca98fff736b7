"""Bits per layer as an integer linear programme, solved exactly by HiGHS (``scipy.optimize.milp``).

Every search that gives a layer a number for each of its candidate widths ends here: the sum of the numbers becomes as
small as the budgets allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts

Sensitivities = Mapping[str, Mapping[LayerBits, float]]
"""By layer, what each of its candidate widths costs in accuracy, in any unit; a layer with one candidate is fixed."""

OBJECTIVE = 1e4
"""The objective's range: HiGHS stops at an absolute gap of 1e-6."""
SLACK = 1e-12
"""Relative: what the product of a value and a number of weights may lose to rounding."""
TIE = 1e-9
"""Sums of sensitivities that differ by no more than this share of their range are equal."""

Vector = NDArray[np.float64]


class Row(NamedTuple):
    """One linear constraint, ``coefficients . x <= most``."""

    coefficients: Vector
    most: float


def allocate(
    sensitivities: Sensitivities, counts: Counts, budgets: Sequence[Budget], current: Allocation | None = None
) -> Allocation:
    """The allocation of least summed sensitivity that is within all budgets; the same input gives the same one.

    ``min sum_l sum_b x_lb s_lb`` with ``sum_b x_lb = 1`` for every layer and ``sum_l sum_b x_lb cost_lb <= value`` for
    every budget, ``x`` binary. What is to be large, such as BMPQ's ``ENBG_l * q``, goes in with a minus.

    Args:
        sensitivities: for all layers of ``counts``.
        counts: the network's.
        budgets: at least one.
        current: taken where no allocation is better, as long as it is among the candidates and within the budgets.

    Raises:
        ValueError: a sensitivity that is not finite, or budgets that cannot be met, with what is feasible.
    """
    choices = {name: list(options) for name, options in sensitivities.items()}
    for name, options in sensitivities.items():
        for bits, value in options.items():
            if not math.isfinite(value):
                raise ValueError(f"sensitivity of {name} at {bits} is {value}: measure on a network with a finite loss")
    for budget in budgets:
        budget.require(counts, choices)
    best = _minimum(sensitivities, choices, counts, budgets)
    if current is not None and all(current.get(name) in options for name, options in choices.items()):
        span = sum(max(options.values()) - min(options.values()) for options in sensitivities.values())
        equal = total(sensitivities, current) <= total(sensitivities, best) + TIE * span
        if equal and all(budget.met(counts, current) for budget in budgets):
            return current
    return best


def total(sensitivities: Sensitivities, allocation: Allocation) -> float:
    """The summed sensitivity of an allocation."""
    return math.fsum(sensitivities[name][bits] for name, bits in allocation.items())


def _minimum(
    sensitivities: Sensitivities,
    choices: Mapping[str, Sequence[LayerBits]],
    counts: Counts,
    budgets: Sequence[Budget],
) -> Allocation:
    layer_of = np.concatenate([np.full(len(options), index) for index, options in enumerate(choices.values())])
    excess = _above_least([[options[bits] for bits in options] for options in sensitivities.values()])
    span = sum(float(excess[layer_of == index].max()) for index in range(len(choices)))
    one_each = (layer_of == np.arange(len(choices))[:, None]).astype(float)
    upper = np.ones(len(layer_of))
    rows = []
    for budget in budgets:
        shares, limit = list(budget.shares(counts, choices).values()), budget.limit(counts)
        if budget.additive:
            rows.append(_row(shares, limit + SLACK * abs(limit)))
        else:
            upper[np.concatenate(shares) > limit] = 0
    while True:
        found = milp(
            excess * (OBJECTIVE / span if span else 1.0),
            integrality=np.ones(len(layer_of)),
            bounds=Bounds(0, upper),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                *(LinearConstraint(row.coefficients[None], -np.inf, row.most) for row in rows),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise ValueError(_infeasible(budgets, counts, choices))
        picks = [int(found.x[layer_of == index].argmax()) for index in range(len(choices))]
        allocation = Allocation(
            {name: options[pick] for (name, options), pick in zip(choices.items(), picks, strict=True)}
        )
        if all(budget.met(counts, allocation) for budget in budgets):
            return allocation
        rows.append(_without(picks, layer_of))  # HiGHS's tolerance let it pass: solve again without this one


def _above_least(values: Sequence[Sequence[float]]) -> Vector:
    """Numbers by layer and choice, less the least of each layer, in one vector."""
    return np.concatenate([np.asarray(options) - min(options) for options in values])


def _row(shares: Sequence[Sequence[float]], limit: float) -> Row:
    """A budget as a constraint: whole numbers are divided by what they have in common, so that tolerances are small."""
    coefficients, most = _above_least(shares), limit - sum(min(options) for options in shares)
    if (coefficients == np.round(coefficients)).all():
        common = math.gcd(*(int(value) for value in coefficients)) or 1
        return Row(coefficients / common, float(math.floor(most / common)))
    return Row(coefficients, most)


def _without(picks: Sequence[int], layer_of: NDArray[np.int64]) -> Row:
    """The constraint that not all of these picks are taken together."""
    taken = np.zeros(len(layer_of))
    for index, pick in enumerate(picks):
        taken[np.flatnonzero(layer_of == index)[pick]] = 1
    return Row(taken, len(picks) - 1)


def _infeasible(budgets: Sequence[Budget], counts: Counts, choices: Mapping[str, Sequence[LayerBits]]) -> str:
    alone = ", ".join(
        f"{budget.key}.value={budget.value:.12g} ({budget.shown(*budget.feasible(counts, choices))})"
        for budget in budgets
    )
    return f"no choice of widths is within all budgets together; each alone has a feasible range: {alone}"
