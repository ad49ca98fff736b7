"""Any two mechanics, and all that go together: they train, or the conflict is named."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from research.learning.mechanic import CLAIMS
from tests.conformance.registry import MECHANICS, Case
from tests.learning.tiny import fit, float_weights, make_module, tiny_net

MODEL = tiny_net()
PAIRS = [
    pytest.param(one, other, id=f"{name}+{another}")
    for (name, one), (another, other) in combinations(MECHANICS.items(), 2)
    if one.slug != other.slug
]


def train(mechanics: dict[str, Any], folder: Path) -> int:
    checkpoint = float_weights(folder / "float.safetensors", MODEL)
    trainer = fit(make_module(mechanics, model=MODEL, checkpoint=checkpoint), max_epochs=1, limit_train_batches=2)
    return int(trainer.global_step)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_mechanics_train_or_name_their_conflict(one: Case, other: Case, tmp_path: Path) -> None:
    mechanics = {**one.mechanics, **other.mechanics}
    if one.build().claims & other.build().claims:
        with pytest.raises(ValueError, match="both claim"):
            make_module(mechanics)
    else:
        assert train(mechanics, tmp_path) == 2


def test_one_representative_of_every_claim_trains_with_the_others(tmp_path: Path) -> None:
    taken: set[str] = set()
    mechanics: dict[str, Any] = {}
    for case in MECHANICS.values():
        claims = case.build().claims
        if case.slug not in mechanics and not claims & taken:
            mechanics |= case.mechanics
            taken |= claims
    assert taken <= set(CLAIMS)
    assert len(mechanics) > 1
    assert train(mechanics, tmp_path) == 2
