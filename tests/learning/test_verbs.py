"""One mechanic with every verb, a private optimizer on search data included: nothing of it is lost by a resume."""

from pathlib import Path
from typing import Any

import pytest

from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.runs.checkpoint import load_checkpoint
from tests.learning.every_verb import State
from tests.learning.tiny import LAST, StopAt, differences, fit, make_data, make_module

SEARCH = 16


def host() -> QuantModule:
    return make_module({"every_verb": {"_target_": "tests.learning.every_verb.EveryVerb"}})


def data() -> Any:
    return make_data(search=SEARCH, options={"train": 40 + SEARCH, "test": 16})


def test_every_verb_acts_and_a_resume_loses_nothing(tmp_path: Path) -> None:
    whole = host()
    fit(whole, data(), folder=tmp_path / "whole")
    state = whole.mechanics["every_verb"]
    assert isinstance(state, State)
    assert (int(state.seen), whole.active[0].steps) == (16, 8)  # type: ignore[attr-defined]
    assert bool((state.drawn > 0).all())
    assert state.learned.item() != 0.5 and state.private.item() != 0.5
    assert not finalise(whole)["final"].fc.bias.any() and whole.net.fc.bias.any()

    with pytest.raises(RuntimeError, match="stopped"):
        fit(host(), data(), folder=tmp_path / "parts", callbacks=(StopAt(3),))
    fit(host(), data(), folder=tmp_path / "parts", resume=tmp_path / "parts" / LAST)
    expected, found = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "parts"))
    assert differences(expected, found) == []
