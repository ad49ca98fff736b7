"""The real thing: `python -m research.train` killed again and again leaves what the uninterrupted run leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research.runs.records import read_metrics
from tests.learning.tiny import float_weights

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"_target_": "research.models.resnet8", "num_classes": 10, "width": 8}
EPOCHS, BATCHES, EVERY = 2, 14, 3
LAST_STEP = EPOCHS * BATCHES - 1
OVERRIDES = [
    "name=killed",
    "data=synthetic",
    "data.batch_size=32",
    f"data.options.train={32 * BATCHES + 32}",
    "data.validation=32",
    "data.options.test=32",
    "model=resnet8",
    "model.width=8",
    "callbacks=[sam,distillation]",
    f"checkpoint.every_n_steps={EVERY}",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger.wandb.mode=disabled",
    "deploy.onnx=false",
]


def kill_points() -> list[int]:
    """Five steps, in order: one before the first checkpoint, one in each quarter of the rest."""
    draw = random.Random(2)
    quarter = (LAST_STEP - EVERY) // 4
    return [draw.randrange(EVERY - 1), *(EVERY + quarter * i + draw.randrange(quarter - 1) for i in range(4))]


def start(runs: Path, init_from: Path) -> subprocess.Popen[bytes]:
    log = (runs.parent / f"{runs.name}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "research.train", *OVERRIDES, f"init_from={init_from}", f"paths.runs={runs}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )


def run_folder(runs: Path) -> Path:
    (folder,) = (runs / "killed").iterdir()
    return folder


def kill_after(process: subprocess.Popen[bytes], step: int, runs: Path) -> None:
    """SIGKILL as soon as the record holds something of ``step``."""
    while process.poll() is None:
        records = list(runs.glob("killed/*/metrics.csv"))
        if records and any(row.step >= step for row in read_metrics(records[0])):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (runs.parent / f"{runs.name}.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_five_kills_leave_no_trace(tmp_path: Path) -> None:
    weights = float_weights(tmp_path / "float.safetensors", MODEL)
    whole = start(tmp_path / "whole", weights)
    for step in kill_points():
        kill_after(start(tmp_path / "parts", weights), step, tmp_path / "parts")
    assert not (run_folder(tmp_path / "parts") / "summary.json").exists()
    last = start(tmp_path / "parts", weights)
    assert last.wait() == 0, (tmp_path / "parts.log").read_text()
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()
    expected, found = run_folder(tmp_path / "whole"), run_folder(tmp_path / "parts")
    assert expected.name == found.name, "the same configuration"
    rows = read_metrics(expected / "metrics.csv")
    assert {row.step for row in rows} == set(range(LAST_STEP + 1))
    assert read_metrics(found / "metrics.csv") == rows
    assert (found / "final.safetensors").read_bytes() == (expected / "final.safetensors").read_bytes()
    assert (tmp_path / "parts.log").read_text().count("resuming from") >= 4
