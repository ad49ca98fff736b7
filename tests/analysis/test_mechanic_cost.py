import json
from pathlib import Path

import pytest

from analysis import mechanic_cost


def test_two_evaluations_a_step_cost_more_than_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost.json"
    mechanic_cost.main(str(output), "none", "resnet8", "sam,noise_tempering", rounds=1, steps=5, batch_size=16)
    record = json.loads(output.read_text())
    assert record["mechanics"]["sam"]["forwards"] == 2
    assert record["mechanics"]["noise_tempering"]["forwards"] == 1
    assert record["mechanics"]["sam"]["ratio"] > 1.2
    assert "sam" in capsys.readouterr().out


def test_what_is_never_compiled_is_not_measured_compiled() -> None:
    with pytest.raises(ValueError, match="only=hero: no mechanic of conf/callbacks that compile=network can measure"):
        mechanic_cost.main(None, "network", "resnet8", "hero", rounds=1, steps=3, batch_size=8)
