"""A grid of short trainings under any launcher, and what must be equal whatever it went through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from research.runs.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
JOB = [
    "name=grid",
    "data.limit_train=600",
    "data.validation=100",
    "data.batch_size=50",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=2",
    "deploy.onnx=false",
    "logger.wandb.mode=disabled",
]


def launch(runs: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start a multirun of the embedded default, shortened; its output goes to ``<runs>.log``."""
    with Path(f"{runs}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "research.train", "-m", *JOB, f"paths.runs={runs}", *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def output(runs: Path) -> str:
    """What the multirun has printed so far."""
    return Path(f"{runs}.log").read_text()


def assert_equal_runs(runs: Path, expected: Path, count: int) -> None:
    """Both hold the same ``count`` finished runs, and their numbers and weights are equal bit for bit."""
    whole = sorted(path.parent for path in expected.glob("grid/*/summary.json"))
    found = sorted(path.parent for path in runs.glob("grid/*/summary.json"))
    assert len(whole) == count and [path.name for path in found] == [path.name for path in whole]
    for one, other in zip(found, whole, strict=True):
        deployments = [json.loads((path / "summary.json").read_text())["deployments"] for path in (one, other)]
        assert deployments[0] == deployments[1]
        assert read_metrics(one / "metrics.csv") == read_metrics(other / "metrics.csv")
        assert (one / "final.safetensors").read_bytes() == (other / "final.safetensors").read_bytes()
