"""Counts of oscillations and accuracies around batch-norm re-estimation of a tiny run, measured once and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis import batchnorm, oscillation
from analysis.collect import Row, collect
from research import results
from research.learning.finalise import measure
from research.quant.batchnorm import reestimate_batchnorm
from research.runs.checkpoint import LAST, load_checkpoint
from research.runs.folder import RunFolder
from research.targets import resolve_target
from research.train import main as train
from tests.analysis.run_folders import write_run
from tests.test_bad_input import TINY, command, run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the tracker."""
    runs = tmp_path_factory.mktemp("runs")
    settings = ("trainer.max_epochs=2", "callbacks=[oscillation_tracker]", "quantizer.bits=2", "optimizer.lr=0.5")
    done = command(train, *TINY, *settings, f"paths.runs={runs}")
    assert done.code == 0, done.err
    return run_folder(runs)


def only(path: Path) -> Row:
    (row,) = collect(str(path))
    return row


def test_counts_of_the_last_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = only(run)
    values = oscillation.oscillation_counts(row)["values"]
    state = load_checkpoint(run / "checkpoints" / LAST)["state_dict"]
    counted = {
        key.split(".")[2].replace("-", "."): value for key, value in state.items() if key.endswith(".oscillations")
    }
    assert values["steps"] == row["steps"] and values["counts"].keys() == counted.keys() and counted
    for name, value in counted.items():
        assert sum(values["counts"][name]) == value.numel()
        assert values["counts"][name][0] == int((value == 0).sum())
    moved = sum(int((value > 0).sum()) for value in counted.values())
    assert moved > 0
    oscillation.main(str(run))
    share = moved / sum(value.numel() for value in counted.values())
    assert f"{share:.2%} of" in capsys.readouterr().out


def test_accuracy_before_and_after(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, folder = only(run), RunFolder.existing(run)
    state = torch.get_rng_state()
    values = batchnorm.measure_batchnorm(row, 1, "data")["values"]
    assert values["before"] == pytest.approx(row["accuracy"])
    data = results.recorded_data(folder, {"data": "data"})
    data.setup()
    net = results.finished_network(folder)
    reestimate_batchnorm(net, results.statistics_batches(data, 1))
    task = resolve_target(row["config"]["task"], key="task")
    assert values["after"] == measure(net, task, results.test_batches(data))["accuracy"]
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(batchnorm, "finished_network", lambda *_: pytest.fail("measured again"))
    assert batchnorm.measure_batchnorm(only(run), 1, "data")["values"] == values


def test_runs_without_a_tracker_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path, 0.8)
    oscillation.main(f"{run},{other.path}")
    assert f"sweep/{other.hash}: left out, no oscillation_tracker" in capsys.readouterr().out


def test_users_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="callbacks=\\[oscillation_tracker\\]"):
        oscillation.oscillation_counts(only(write_run(tmp_path, 0.8).path))
    with pytest.raises(ValueError, match="none of them counted anything"):
        oscillation.main(str(tmp_path / "sweep/*"))
    with pytest.raises(ValueError, match="batches=0: use 1 or more"):
        batchnorm.main(str(run), 0, "data")
    with pytest.raises(ValueError, match="batches=9999: the training part has"):
        batchnorm.measure_batchnorm(only(run), 9999, "data")
    row = only(run)
    row["config"]["finalise"]["batchnorm_batches"] = 4
    with pytest.raises(ValueError, match="accuracy_before_batchnorm in its summary"):
        batchnorm.measure_batchnorm(row, 1, "data")
