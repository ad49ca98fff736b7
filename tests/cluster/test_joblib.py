"""Joblib's processes: a job that fails in the middle ends no other one, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.launched import launch, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_failed_job_does_not_end_the_others(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="no joblib: pip install -e '.[joblib]'")
    short = ("trainer.max_epochs=1", "model.width=4")
    grid = launch(tmp_path / "runs", *short, "seed=0,abc,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert grid.wait() == 2, output(tmp_path / "runs")
    assert len(list(tmp_path.glob("runs/grid/*/summary.json"))) == 2
    assert output(tmp_path / "runs").splitlines()[-1] == "error: job 1 (seed=abc): seed='abc': use an integer"
