"""The configurations among which a search ends: drawn from the policy until enough are close below the budget."""

from __future__ import annotations

from collections.abc import Callable

import torch

from callbacks.samq.policy import Policy

CHUNK = 100
Picks = tuple[int, ...]


def drawn_near(
    policy: Policy,
    generator: torch.Generator,
    cost: Callable[[Picks], float],
    most: float,
    least: float,
    count: int,
    draws: int,
    candidates: int,
) -> list[Picks]:
    """Different configurations with ``least <= cost <= most``, in the order in which they were drawn.

    Where ``draws`` draws have fewer than ``count`` of them, those are taken whose cost is the nearest below ``most``.
    Where not one draw has a cost of ``most`` or less, the widest candidate is left out and the policy is asked again.

    Args:
        policy: draws picks.
        generator: of the draws.
        cost: of picks.
        most, least: the budget, and the cost below which a configuration is too small.
        count: how many are wanted.
        draws: how often the policy is asked at most.
        candidates: number of candidates of a decision, in order of their cost.

    Raises:
        ValueError: even the narrowest candidates cost more than ``most``.
    """
    costs: dict[Picks, float] = {}
    for among in range(candidates, 0, -1):
        for begin in range(0, draws, CHUNK):
            for row in policy.sample(generator, min(CHUNK, draws - begin), among).tolist():
                picks = tuple(row)
                if picks not in costs:
                    costs[picks] = cost(picks)
            near = [picks for picks, value in costs.items() if least <= value <= most]
            if len(near) >= count:
                return near[:count]
        within = [picks for picks, value in costs.items() if value <= most]
        if within:
            return sorted(within, key=lambda picks: -costs[picks])[:count]
    raise ValueError(f"no configuration costs {most:.12g} or less")
