"""A real Ray cluster on this machine: a job fails, a worker is killed, and the grid comes out as undisturbed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.run_state import folder_at
from research.runs.records import read_metrics
from tests.cluster.launched import assert_equal_runs, launch, output

SEEDS = "seed=0,1,2,abc,3,4,5"
LAUNCHER = (
    "hydra/launcher=ray",
    "+hydra.launcher.ray.init.num_cpus=2",
    "+hydra.launcher.ray.init.include_dashboard=false",
)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "240",  # on a machine that is busy with other things
}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets."""
    path = Path(tempfile.mkdtemp(prefix="ray"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def a_worker_in_mid_epoch(runs: Path, grid: subprocess.Popen[str]) -> int:
    """The process of a run that is within its third epoch or a later one, with a checkpoint behind it."""
    while grid.poll() is None:
        for path in runs.glob("grid/*/checkpoints/last.ckpt"):
            folder = folder_at(path.parents[1])
            rows = read_metrics(folder.metrics_path)
            epoch, step = rows[-1].epoch, rows[-1].step
            within = step - min(row.step for row in rows if row.epoch == epoch)
            if epoch is not None and epoch >= 2 and within in (2, 3) and folder.held:
                return int((folder.path / ".lock").read_text())
        time.sleep(0.005)
    raise AssertionError(output(runs))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_worker_and_a_failed_job_leave_the_others_as_they_were(tmp_path: Path, short_folder: Path) -> None:
    missing = [name for name in ("ray", "hydra_plugins.hydra_ray_launcher") if not found(name)]
    if missing:
        pytest.skip("no Ray: pip install -c constraints.txt ray && pip install --no-deps hydra-ray-launcher")
    home = tmp_path / "home"
    home.mkdir()
    under_ray = launch(
        tmp_path / "ray", SEEDS, *LAUNCHER, f"+hydra.launcher.ray.init._temp_dir={short_folder}",
        HOME=str(home), MPLCONFIGDIR=str(tmp_path / "mpl"), **ENVIRONMENT,
    )  # fmt: skip
    try:
        worker = a_worker_in_mid_epoch(tmp_path / "ray", under_ray)
        assert worker != under_ray.pid
        os.kill(worker, signal.SIGKILL)
        assert under_ray.wait() == 2, output(tmp_path / "ray")
    finally:
        under_ray.terminate()
        under_ray.wait()
    assert launch(tmp_path / "whole", SEEDS).wait() == 2, output(tmp_path / "whole")
    for log in (output(tmp_path / "ray"), output(tmp_path / "whole")):
        assert "error: job 3 (seed=abc): seed='abc': use an integer" in log
    assert "resuming from last.ckpt" in output(tmp_path / "ray"), "Ray itself starts the killed job again"
    assert_equal_runs(tmp_path / "ray", tmp_path / "whole", count=6)
    assert list(home.iterdir()) == []


def found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
