"""Real SLURM: an array of runs, killed, pre-empted and out of time, leaves what undisturbed runs leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from research.runs.records import read_config, read_metrics, read_summary

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("FLATBIT_SLURM") != "1",
        reason="no SLURM cluster: bash tests/cluster/slurm.sh .venv/bin/python -m pytest tests/cluster",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH, EPOCHS = 40, 4
REQUEUED, KILLED, OUT_OF_TIME, DISPLACED = 0, 1, 2, 5
"""Seeds, and tasks of the array, that meet with something."""
SEEDS = range(6)
OVERRIDES = [  # of the embedded default: shorter
    "seed=" + ",".join(map(str, SEEDS)),
    "model.width=4",
    "data.batch_size=32",
    f"data.limit_train={32 * STEPS_PER_EPOCH}",
    "calibration.batch_size=32",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
]
SLURM = [
    "hydra/launcher=slurm",
    "hydra.launcher.timeout_min=30",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.gres=shard:1",  # two runs on the one GPU of the test cluster
]


class Sweep:
    """`python -m research.train -m ...` in the background, and what it leaves in `runs`."""

    def __init__(self, runs: Path, *launcher: str) -> None:
        self.runs = runs
        self.log = runs.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "research.train", "-m", *OVERRIDES, *launcher, f"paths.runs={runs}"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                stdout=log,
                stderr=log,
            )

    def succeed(self) -> None:
        """Wait for the end of the command, which has to be a good one."""
        assert self.process.wait(600) == 0, self.log.read_text()

    def folder(self, seed: int) -> Path | None:
        """The run folder of a seed, once the run has begun."""
        configs = self.runs.glob("default/*/config.yaml")
        return next((path.parent for path in configs if read_config(path)["seed"] == seed), None)

    def finished(self, seed: int) -> bool:
        folder = self.folder(seed)
        return folder is not None and (folder / "summary.json").exists()

    def step(self, seed: int) -> int:
        """The last step in the record of a seed; -1 before the first."""
        folder = self.folder(seed)
        metrics = folder / "metrics.csv" if folder else None
        return max((row.step for row in read_metrics(metrics)), default=-1) if metrics and metrics.exists() else -1

    def output(self, seed: int) -> str:
        """What the tasks of a seed printed, of all their starts."""
        return "".join(
            path.read_text() for path in sorted(self.runs.glob(f"multirun/*/.submitit/*/*_{seed}_0_log.out"))
        )


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_for(happened: Callable[[], Any], what: str, sweep: Sweep) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert time.monotonic() < deadline, f"{what} never came\n{slurm('squeue')}{sweep.log.read_text()}"
        time.sleep(0.1)


def within_an_epoch(sweep: Sweep, seed: int) -> None:
    """Wait until a seed is in the first half of its second epoch or later."""
    wait_for(lambda: sweep.step(seed) > STEPS_PER_EPOCH, f"step {STEPS_PER_EPOCH} of seed {seed}", sweep)


def numbers(folder: Path) -> dict[str, Any]:
    """The summary, less the seconds it took."""
    return {key: value for key, value in read_summary(folder / "summary.json").items() if key != "seconds"}


@pytest.fixture
def undisturbed(tmp_path: Path) -> Iterator[Sweep]:
    """The same runs one after the other in a process of their own, outside of SLURM."""
    sweep = Sweep(tmp_path / "undisturbed")
    yield sweep
    sweep.process.kill()


def test_an_array_survives(tmp_path: Path, undisturbed: Sweep) -> None:
    sweep = Sweep(tmp_path / "disturbed", *SLURM)
    wait_for(lambda: slurm("squeue", "--noheader"), "the array", sweep)
    (array,) = set(slurm("squeue", "--noheader", "--format=%F").split())

    within_an_epoch(sweep, REQUEUED)
    slurm("scontrol", "requeue", f"{array}_{REQUEUED}")
    within_an_epoch(sweep, KILLED)
    killed = sweep.folder(KILLED)
    assert killed is not None
    os.kill(int((killed / ".lock").read_text()), signal.SIGKILL)
    within_an_epoch(sweep, OUT_OF_TIME)
    job = slurm("squeue", "--noheader", "--format=%A", f"--jobs={array}_{OUT_OF_TIME}").strip()
    slurm("scancel", "--signal=USR2", f"{job}.0")  # what SLURM sends before the time limit
    within_an_epoch(sweep, DISPLACED)
    slurm("srun", "--partition=urgent", "--cpus-per-task=2", "true")  # takes the node from what runs there

    wait_for(lambda: not slurm("squeue", "--noheader"), "the end of the array", sweep)
    sweep.process.kill()  # without job accounting it waits for the killed task for ever; nobody needs it
    unfinished = {seed for seed in SEEDS if not sweep.finished(seed)}
    # what is displaced while it imports dies within its grace time, and SLURM does not requeue what ends by itself
    assert KILLED in unfinished and unfinished <= {KILLED, REQUEUED}
    again = Sweep(tmp_path / "disturbed", *SLURM)
    again.succeed()
    undisturbed.succeed()

    for seed in SEEDS:
        expected, found = undisturbed.folder(seed), sweep.folder(seed)
        assert expected is not None and found is not None and expected.name == found.name
        assert numbers(found) == numbers(expected), json.dumps([numbers(found), numbers(expected)], indent=1)
        for file in ("final.safetensors", "metrics.csv"):
            assert (found / file).read_bytes() == (expected / file).read_bytes(), (seed, file)
        starts = list((found / "wandb").glob("offline-run-*"))
        assert {path.name.rpartition("-")[2] for path in starts} == {found.name}, "one W&B run for all starts"

    for seed, number in ((REQUEUED, "SIGTERM"), (OUT_OF_TIME, "SIGUSR2"), (DISPLACED, "SIGTERM")):
        stopped = re.findall(rf"{number}: training stopped at step (\d+), behind its checkpoint", sweep.output(seed))
        resumed = re.findall(r"resuming from last.ckpt \(step (\d+)\)", sweep.output(seed))
        assert stopped == resumed and resumed, sweep.output(seed)
        assert seed == REQUEUED or len(resumed) == 1, "the requeued one may be displaced as well"
        assert seed == DISPLACED or int(stopped[0]) % STEPS_PER_EPOCH, "within an epoch"
    assert "resuming from last.ckpt" in sweep.output(KILLED)
