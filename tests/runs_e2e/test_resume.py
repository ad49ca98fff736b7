"""Resuming through the command's own entry point: settings that a checkpoint has to carry, and the seconds of a run."""

import json
from pathlib import Path

import pytest

from research.runs.checkpoint import VerifiedCheckpointIO, load_checkpoint
from research.train import main as train
from tests.test_bad_input import STEPS_PER_EPOCH, TINY, Trouble, command, run_folder, trouble

CARRIED = (
    "trainer.precision=bf16",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=1.0",
    "checkpoint.every_n_steps=1",
    "checkpoint.monitor=val/accuracy",
    "finalise.weights=best",
    "callbacks=[sam]",
)


def test_an_interrupted_run_equals_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [*TINY, *CARRIED, *trouble(STEPS_PER_EPOCH, "stop")]  # in the second half: batches are accumulated
    assert command(train, *common, f"paths.runs={tmp_path}/whole").code == 0
    monkeypatch.setattr(Trouble, "armed", True)
    assert command(train, *common, f"paths.runs={tmp_path}/parts").refusal() == "error: stopped"
    monkeypatch.setattr(Trouble, "armed", False)
    resumed = command(train, *common, f"paths.runs={tmp_path}/parts")
    assert resumed.code == 0 and "resuming from last.ckpt" in resumed.out
    whole, parts = run_folder(tmp_path / "whole"), run_folder(tmp_path / "parts")
    for file in ("final.safetensors", "metrics.csv"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_seconds_of_a_run_are_those_of_all_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY, f"paths.runs={tmp_path}", *trouble(2 * STEPS_PER_EPOCH + 1, "stop")]
    monkeypatch.setattr(Trouble, "armed", True)
    assert command(train, *arguments).refusal() == "error: stopped"
    monkeypatch.setattr(Trouble, "armed", False)
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    assert 0 < checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] < 1000
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 1000.0
    VerifiedCheckpointIO().save_checkpoint(checkpoint, last)
    assert command(train, *arguments).code == 0
    assert 1000 < json.loads((run_folder(tmp_path) / "summary.json").read_text())["seconds"] < 2000
