"""``research.evaluate ptq=[...]`` on a finished run, through the command's own entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from research.deploy import load_artifact
from research.evaluate import main as evaluate
from research.learning.finalise import measure
from research.quant.layers import quant_layers
from research.results import test_batches as whole_test_set
from research.train import build
from research.train import main as train
from tests.test_bad_input import TINY, command, contents, run_folder
from tests.test_config import composed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished float run."""
    runs = tmp_path_factory.mktemp("float")
    done = command(train, *TINY, "quantizer=float", f"paths.runs={runs}")
    assert done.code == 0, done.err
    return run_folder(runs)


def test_a_float_run_at_lower_widths(finished: Path) -> None:
    done = command(evaluate, f"run={finished}", "ptq=[8,3]")
    assert done.code == 0, done.err
    table = [line.split() for line in done.out.splitlines()]
    assert table[0] == ["deployment", "range", "bits", "accuracy", "loss"]
    assert [line[:3] for line in table[1:3]] == [["final", "minmax", "8"], ["final", "minmax", "3"]]
    assert "recorded_accuracy" in done.out, "the run's own test is there as well"
    assert command(evaluate, f"run={finished}", "ptq=[3]", "ptq_range=mse").code == 0
    rows = json.loads((finished / "ptq.json").read_text())["rows"]
    assert [(row["range"], row["bits"]) for row in rows] == [("minmax", 8), ("minmax", 3), ("mse", 3)]
    net = load_artifact(finished / "artifact")
    with torch.no_grad():
        for _, layer in quant_layers(net):
            scale = layer.weight.abs().max() / 3
            layer.weight.copy_(torch.round(layer.weight / scale) * scale)
    data, module = build(composed([*TINY, "quantizer=float"]))
    expected = measure(net, module.task, whole_test_set(data))
    assert rows[1]["accuracy"] == expected["accuracy"]
    assert rows[1]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ptq=[9]", "ptq=9: use widths from 2 to 8, such as ptq=[8,7,6,5,4,3]"),
        ("ptq=[4,three]", "ptq=three: use widths from 2 to 8"),
        ("ptq=4", "ptq=4: use a list of widths, such as ptq=[8,7,6,5,4,3], or []"),
        ("ptq=[4] ptq_range=lsq", "ptq_range=lsq: use one of minmax, mse"),
    ],
)
def test_a_wrong_request_writes_nothing(finished: Path, override: str, message: str) -> None:
    before = contents(finished)
    assert message in command(evaluate, f"run={finished}", *override.split()).refusal()
    assert contents(finished) == before


def test_a_quantized_run_is_refused(tmp_path: Path) -> None:
    assert command(train, *TINY, "trainer.max_epochs=1", f"paths.runs={tmp_path}").code == 0
    folder = run_folder(tmp_path)
    before = contents(folder)
    line = command(evaluate, f"run={folder}", "ptq=[4]").refusal()
    assert "quantizes this network already; use a run with quantizer=float" in line
    assert contents(folder) == before
