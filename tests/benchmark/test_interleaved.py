"""Variants take turns, and ratios come out of the medians."""

from __future__ import annotations

import pytest

from analysis.benchmark import interleaved as measuring
from analysis.benchmark.interleaved import interleaved, ratios


def test_every_variant_runs_once_before_any_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, now = [], [0.0]
    monkeypatch.setitem(measuring.CLOCKS, "wall", lambda: now[0])

    def variant(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    seconds = interleaved({"a": lambda: variant("a", 1.0), "b": lambda: variant("b", 2.0)}, rounds=3, warmup=2)
    assert calls == ["a", "a", "b", "b", *"ab" * 3]
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_ratios_are_of_medians_with_the_quartiles_of_rounds() -> None:
    found = ratios({"float": [1.0, 1.0, 2.0, 1.0, 1.0], "ours": [1.5, 1.2, 2.4, 9.0, 1.6]}, "float")
    assert found["float"] == {"ms": 1000.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    assert found["ours"] == pytest.approx({"ms": 1600.0, "ratio": 1.6, "low": 1.2, "high": 1.6})


def test_an_unknown_clock_is_refused() -> None:
    with pytest.raises(ValueError, match="clock=sand: use one of wall, processor"):
        interleaved({}, 1, clock="sand")
