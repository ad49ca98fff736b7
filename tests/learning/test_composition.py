"""Which mechanics go together, in which order, and what the composed objective is."""

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from research.learning.composition import check_composition, compose_objective, plan
from research.learning.evaluation import Evaluation, Objective
from research.learning.mechanic import CLAIMS, Mechanic
from tests.learning.tiny import make_module


def mechanic(slug: str, **attributes: Any) -> Mechanic:
    return type(slug, (Mechanic,), {"slug": slug, **attributes})()


def evaluate(batch: Any, state: Any = None) -> Evaluation:
    task = torch.tensor(2.0)
    return Evaluation(batch, task, None, {"task": task})


class Scaling(Mechanic):
    """Multiplies the loss and adds one: the order of two of them shows."""

    def __init__(self, slug: str, stage: str, factor: float) -> None:
        self.slug, self.stage, self.factor = slug, stage, factor  # type: ignore[misc, assignment]

    def wrap_objective(self, objective: Objective) -> Objective:
        def scaled(batch: Any, state: Any = None) -> Evaluation:
            inner = objective(batch, state)
            return Evaluation(batch, inner.loss * self.factor + 1, inner.outputs, inner.terms)

        return scaled


class Term(Mechanic):
    def __init__(self, slug: str, name: str, value: float, claims: tuple[str, ...] = ()) -> None:
        self.slug, self.name, self.value = slug, name, value  # type: ignore[misc]
        self.claims = frozenset(claims)  # type: ignore[arg-type]

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        return {self.name: torch.tensor(self.value)}


def test_the_order_of_the_list_never_matters() -> None:
    scalings = [Scaling("b", "inner", 2.0), Scaling("a", "outer", 3.0), Scaling("c", "inner", 5.0)]
    mechanics = [*scalings, Term("t", "t", 0.5)]
    losses = {float(compose_objective(evaluate, order)(None).loss) for order in permutations(mechanics)}
    assert losses == {3 * (5 * (2 * 2.5 + 1) + 1) + 1.0}
    assert len({plan(order) for order in permutations(mechanics)}) == 1


def test_the_host_runs_its_mechanics_in_one_order() -> None:
    sam = {"_target_": "callbacks.sam.SAM"}
    distillation = {"_target_": "callbacks.distillation.Distillation"}
    one = make_module({"sam": sam, "distillation": distillation})
    other = make_module({"distillation": distillation, "sam": sam})
    slugs = [active.slug for active in one.active]
    assert slugs == [active.slug for active in other.active] == ["distillation", "sam"]


def test_terms_add_up_and_a_lone_task_is_left_alone() -> None:
    alone = compose_objective(evaluate, [])(None)
    assert alone.loss is alone.terms["task"]
    both = compose_objective(evaluate, [Term("one", "x", 0.25), Term("two", "y", 0.5)])(None)
    assert {name: float(value) for name, value in both.terms.items()} == {"task": 2.0, "x": 0.25, "y": 0.5}
    assert float(both.loss) == 2.75


def test_two_terms_of_one_name_are_refused() -> None:
    objective = compose_objective(evaluate, [Term("one", "x", 0.25), Term("two", "x", 0.5)])
    with pytest.raises(ValueError, match="callbacks.two adds the loss term 'x', which exists already"):
        objective(None)


def test_only_the_owner_of_the_task_loss_may_replace_it() -> None:
    owner = compose_objective(evaluate, [Term("one", "task", 0.0, ("task_loss",))])(None)
    assert float(owner.loss) == 0.0
    assert list(owner.terms) == ["task"]
    with pytest.raises(ValueError, match="callbacks.one adds the loss term 'task'"):
        compose_objective(evaluate, [Term("one", "task", 0.0)])(None)


@pytest.mark.parametrize("claim", CLAIMS)
def test_one_owner_of_each_claim(claim: str) -> None:
    one, other = mechanic("one", claims=frozenset({claim})), mechanic("other", claims=frozenset({claim, "bits"}))
    for pair in ([one, other], [other, one]):
        with pytest.raises(ValueError, match=r"callbacks.one and callbacks.other both claim .*'~callbacks.other'"):
            check_composition(pair, "32", compiled=False)
    check_composition([one, mechanic("free")], "32", compiled=False)


@pytest.mark.parametrize(
    ("attributes", "precision", "compiled", "message"),
    [
        ({"claims": frozenset({"weights"})}, "32", False, "callbacks.one claims 'weights': use one of"),
        ({"precisions": ("32",)}, "bf16", False, "trainer.precision=bf16: callbacks.one works in 32; use .*=32"),
        ({"needs_double_backward": True}, "32", True, "compile=network: callbacks.one .*; use compile=none"),
    ],
)
def test_what_a_run_cannot_give_is_refused(attributes: Any, precision: str, compiled: bool, message: str) -> None:
    one = mechanic("one", **attributes)
    with pytest.raises(ValueError, match=message):
        check_composition([one], precision, compiled)


def test_what_a_run_can_give_is_accepted() -> None:
    check_composition([mechanic("one", precisions=("32",), needs_double_backward=True)], "32", compiled=False)


def test_a_mechanic_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="callbacks.one is given twice"):
        check_composition([mechanic("one"), mechanic("one")], "32", compiled=False)


def test_the_plan_names_verbs_claims_and_ddp_from_inner_to_outer() -> None:
    assert plan([]) == "mechanics: none"
    outer = mechanic("out", stage="outer", claims=frozenset({"bits", "codes"}), wrap_objective=lambda self, f: f)
    inner = mechanic("in", stage="inner", ddp="per_replica", attach=lambda self, module: None)
    assert plan([outer, inner]).splitlines() == [
        "mechanics, from inner to outer:",
        "  in (inner): attach; claims nothing; ddp per_replica",
        "  out (outer): wrap_objective; claims bits, codes; ddp exact",
    ]


def test_decisions_are_drawn_alike_by_all_and_anew_each_step() -> None:
    def draw(slug: str, step: int, seed: int = 0) -> float:
        one = mechanic(slug)
        one.bind(make_module(seed=seed))
        torch.manual_seed(step)
        return float(torch.rand((), generator=one.rng(step), dtype=torch.float64))

    assert draw("one", 3) == draw("one", 3)
    assert len({draw("one", 3), draw("one", 4), draw("two", 3), draw("one", 3, seed=1)}) == 4
