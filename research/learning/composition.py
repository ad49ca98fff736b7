"""Composition: which mechanics go together, in which order, and the objective that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from research.learning.evaluation import Evaluation, Objective, State
from research.learning.mechanic import CLAIMS, STAGES, Mechanic

VERBS = ("attach", "prepare", "parameter_groups", "loss_terms", "wrap_objective", "after_step", "finalise")


def ordered(mechanics: Sequence[Mechanic]) -> list[Mechanic]:
    """Mechanics by stage (inner first), then by slug: the order of a config's list never matters."""
    return sorted(mechanics, key=lambda mechanic: (STAGES.index(mechanic.stage), mechanic.slug))


def check_composition(mechanics: Sequence[Mechanic], precision: str, compiled: bool) -> None:
    """Refuse mechanics that cannot work together or in this run.

    Args:
        mechanics: all mechanics of the run.
        precision: ``32`` or ``bf16``.
        compiled: whether the network is to be compiled.

    Raises:
        ValueError: naming the mechanics and the override that resolves the conflict.
    """
    for mechanic in mechanics:
        unknown = [claim for claim in mechanic.claims if claim not in CLAIMS]
        if unknown:
            raise ValueError(f"callbacks.{mechanic.slug} claims {unknown[0]!r}: use one of {', '.join(CLAIMS)}")
        if precision not in mechanic.precisions:
            raise ValueError(
                f"trainer.precision={precision}: callbacks.{mechanic.slug} works in "
                f"{' or '.join(mechanic.precisions)}; use trainer.precision={mechanic.precisions[0]}"
            )
        if compiled and mechanic.needs_double_backward:
            raise ValueError(
                f"compile=network: callbacks.{mechanic.slug} takes second derivatives, which a compiled network does "
                "not have; use compile=none"
            )
    for one, other in combinations(ordered(mechanics), 2):
        if one.slug == other.slug:
            raise ValueError(f"callbacks.{one.slug} is given twice: keep one")
        shared = one.claims & other.claims
        if shared:
            raise ValueError(
                f"callbacks.{one.slug} and callbacks.{other.slug} both claim {sorted(shared)[0]}: drop one of them, "
                f"e.g. '~callbacks.{other.slug}'"
            )


def compose_objective(evaluate: Callable[[Any, State | None], Evaluation], mechanics: Sequence[Mechanic]) -> Objective:
    """The objective of a fit: the task's evaluation, all loss terms, then every ``wrap_objective`` from inner to outer.

    Args:
        evaluate: the task's evaluation of the network, with the one term ``task``.
        mechanics: all mechanics of the run.
    """
    order = ordered(mechanics)

    def with_terms(batch: Any, state: State | None = None) -> Evaluation:
        evaluation = evaluate(batch, state)
        terms: dict[str, Tensor] = dict(evaluation.terms)
        for mechanic in order:
            _add_terms(terms, mechanic, mechanic.loss_terms(evaluation))
        return replace(evaluation, terms=terms, loss=total(terms))

    objective: Objective = with_terms
    for mechanic in order:
        objective = mechanic.wrap_objective(objective)
    return objective


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of the terms, in their order; a single term is returned as it is."""
    values = list(terms.values())
    loss = values[0]
    for value in values[1:]:
        loss = loss + value
    return loss


def plan(mechanics: Sequence[Mechanic]) -> str:
    """The resolved plan as text, a line a mechanic in the order of wrapping: verbs, claims, DDP promise."""
    if not mechanics:
        return "mechanics: none"
    lines = ["mechanics, from inner to outer:"]
    for mechanic in ordered(mechanics):
        verbs = [verb for verb in VERBS if getattr(type(mechanic), verb) is not getattr(Mechanic, verb)]
        claims = ", ".join(sorted(mechanic.claims)) or "nothing"
        lines.append(f"  {mechanic.slug} ({mechanic.stage}): {', '.join(verbs)}; claims {claims}; ddp {mechanic.ddp}")
    return "\n".join(lines)


def _add_terms(terms: dict[str, Tensor], mechanic: Mechanic, new: Mapping[str, Tensor]) -> None:
    for name, value in new.items():
        if name in terms and not (name == "task" and "task_loss" in mechanic.claims):
            raise ValueError(f"callbacks.{mechanic.slug} adds the loss term {name!r}, which exists already: rename it")
        terms[name] = value
