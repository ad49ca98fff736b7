import json
from pathlib import Path

import pytest

from analysis import cost_lines, mechanic_cost
from analysis.mechanics import measured

ROOT = Path(__file__).parents[2]


def test_two_evaluations_a_step_cost_more_than_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost.json"
    mechanic_cost.main(str(output), "none", "resnet8", "sam,noise_tempering", rounds=1, steps=5, batch_size=16)
    record = json.loads(output.read_text())
    assert record["mechanics"]["sam"]["forwards"] == 2
    assert record["mechanics"]["noise_tempering"]["forwards"] == 1
    assert record["mechanics"]["sam"]["ratio"] > 1.2
    assert 0.8 < record["mechanics"]["sam"]["memory"] < 2.5
    assert "sam" in capsys.readouterr().out


def test_what_is_never_compiled_is_not_measured_compiled() -> None:
    with pytest.raises(ValueError, match="only=hero: no mechanic of conf/callbacks that compile=network can measure"):
        mechanic_cost.main(None, "network", "resnet8", "hero", rounds=1, steps=3, batch_size=8)


COST = {"forwards": 2, "ratio": 2.104, "memory": 0.998}


def test_a_cost_line_is_written_anew() -> None:
    card = "before\n\nMeasured: long ago. <!-- cost: sam -->\n\nafter\n"
    first = cost_lines.renewed(card, {"sam": COST})
    assert "sam, 2 forward passes a step, 2.10 times the time and 1.00 times the kept memory" in first
    assert first.startswith("before\n\nMeasured: sam, ") and first.endswith(" <!-- cost: sam -->\n\nafter\n")
    assert cost_lines.renewed(first, {"sam": COST}) == first


def test_a_mechanic_that_was_not_measured_has_no_line() -> None:
    with pytest.raises(ValueError, match="cost: sam has not been measured; run python -m analysis.mechanic_cost"):
        cost_lines.line("sam", {})


def test_every_card_says_what_the_record_says() -> None:
    record = measured()["mechanics"]
    assert set(record) == {path.stem for path in (ROOT / "conf/callbacks").glob("*.yaml")}
    marked = []
    for path in sorted((ROOT / "docs/methods").glob("*.md")):
        text = path.read_text()
        marked += cost_lines.MARK.findall(text)
        assert cost_lines.renewed(text, record) == text, f"{path.name}: python -m analysis.cost_lines writes it anew"
    assert len(marked) == len(set(marked))
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} & set(record) <= set(marked)
