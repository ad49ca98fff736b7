"""W&B's own process ends when SLURM signals a whole job: the run's record goes on, and so does the next run's W&B."""

import os
import signal
import time
from pathlib import Path

import pytest

from research.runs.folder import RunFolder
from research.runs.logger import RunLogger, finish_wandb, wandb_logger
from research.runs.records import read_metrics


def end_service() -> None:
    """End W&B's process, a child of this one, as SLURM does."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid, name, state, parent = stat.read_text().split()[:4]
        if name == "(wandb-core)" and state != "Z" and int(parent) == os.getpid():
            os.kill(int(pid), signal.SIGTERM)
            while stat.exists() and stat.read_text().split()[2] != "Z":
                time.sleep(0.1)
            return
    raise AssertionError("W&B has no process")


def test_the_death_of_wandbs_process_ends_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 2):
        folder = RunFolder.of(tmp_path, "mini", {"seed": seed})
        record, wandb = RunLogger(folder), wandb_logger(folder, {"seed": seed})
        assert wandb is not None
        for step in range(3):
            wandb.log_metrics({"loss": 1.0}, step)
            record.log_metrics({"loss": 1.0}, step)
            if step == 0:
                end_service()
        finish_wandb(wandb, folder)
        assert len(list(folder.wandb.glob("offline-run-*"))) == 1
        assert [row.step for row in read_metrics(folder.metrics_path)] == [0, 1, 2]
    ours = [entry.message[:21] for entry in caplog.records if entry.name == "research.runs.wandb_mirror"]
    assert ours == 2 * ["W&B's process is gone"]
