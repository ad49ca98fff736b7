"""Two processes from the command line: one run folder, sealed by the first rank on the whole test set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "name=ddp",
    "data=synthetic",
    "data.options.test=96",
    "model=resnet8",
    "model.width=4",
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.strategy=ddp",
    "finalise.batchnorm_batches=1",
    "logger.wandb.mode=disabled",
]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_processes_seal_one_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "research.train", *OVERRIDES, f"paths.runs={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "ddp").iterdir()
    (row,) = json.loads((folder / "summary.json").read_text())["deployments"]
    assert row["parity"]["count"] == 96
    assert row["argmax_agreement"] > 0.98
    assert row["accuracy"] == pytest.approx(row["parity"]["top1_torch"], abs=1e-6)
