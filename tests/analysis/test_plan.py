"""The plan of a sweep: the jobs that Hydra makes, their folders, and the hours by the record of the nearest run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis import plan, status
from analysis.duration import Durations
from analysis.sweep_jobs import sweep_jobs
from research.runs.folder import RunFolder
from research.runs.records import write_config, write_summary
from research.train import main as train
from tests.test_bad_input import TINY, command

GRID = [*TINY, "trainer.max_epochs=1", "name=grid", "model.width=4,8", "seed=0,abc,1"]


def config(**changes: Any) -> dict[str, Any]:
    """What of a plain config an estimate looks at."""
    values: dict[str, Any] = {
        "name": "like", "seed": 0, "model": {"_target_": "research.models.resnet8", "width": 8},
        "data": {"name": "embedded", "batch_size": 128, "seed": 0}, "callbacks": {}, "optimizer": {"lr": 0.1},
        "trainer": {"max_epochs": 10, "max_steps": -1}, "compile": "none",
    }  # fmt: skip
    return {**values, **changes}


def finished(root: Path, values: dict[str, Any], seconds: float) -> RunFolder:
    folder = RunFolder.of(root, values["name"], values)
    write_config(folder.config_path, values)
    extra = {
        "model": "resnet8", "data": values["data"]["name"], "mechanics": sorted(values["callbacks"]),
        "epochs": 4, "steps": 100, "seconds": seconds, "hardware": "a CPU",
    }  # fmt: skip
    write_summary(folder, values["seed"], [{"name": "final", "accuracy": 0.9}], extra)
    return folder


def test_the_estimate_is_that_of_the_nearest_like_run(tmp_path: Path) -> None:
    near = finished(tmp_path, config(optimizer={"lr": 0.2}), seconds=40)
    finished(tmp_path, config(optimizer={"lr": 0.2}, compile="network", name="far"), seconds=400)
    finished(tmp_path, config(model={"_target_": "research.models.resnet8", "width": 16}), seconds=4000)
    finished(tmp_path, config(callbacks={"sam": {"rho": 0.1}}), seconds=8)
    durations = Durations([tmp_path])
    estimate = durations.estimate(config())
    assert estimate is not None and estimate.seconds == pytest.approx(100)  # 40 s / 4 epochs x 10 epochs
    assert estimate.source.folder.path == near.path and estimate.source.hardware == "a CPU"
    resumed = durations.estimate(config(), done_steps=50)
    assert resumed is not None and resumed.seconds == pytest.approx(80)  # 0.4 s a step
    short = durations.estimate(config(trainer={"max_epochs": 10, "max_steps": 30}))
    assert short is not None and short.seconds == pytest.approx(12)
    sam = durations.estimate(config(callbacks={"sam": {"rho": 0.5}}))
    assert sam is not None and sam.seconds == pytest.approx(20)
    assert durations.estimate(config(data={"name": "cifar10", "batch_size": 128, "seed": 0})) is None
    assert durations.estimate(config(data={"name": "embedded", "batch_size": 64, "seed": 0})) is None
    assert durations.estimate(config(trainer={"max_epochs": -1, "max_steps": -1})) is None


def test_the_jobs_of_a_sweep_file() -> None:
    jobs = sweep_jobs("saq_rho", ["seed=3,4", "trainer.max_epochs=1"], runs="somewhere")
    assert len(jobs) == 3 * 3 * 2
    assert jobs[0].overrides == ("callbacks.saq.case=1", "callbacks.saq.rho=0.05", "seed=3")
    assert jobs[-1].overrides == ("callbacks.saq.case=3", "callbacks.saq.rho=0.9", "seed=4")
    assert all(job.config is not None and job.config["trainer"]["max_epochs"] == 1 for job in jobs)
    paths = {job.folder.path for job in jobs if job.folder is not None}
    assert len(paths) == len(jobs)
    assert {path.parent for path in paths} == {Path("somewhere/saq_resnet20_cifar10_w2a2").absolute()}


def test_what_is_no_sweep() -> None:
    with pytest.raises(ValueError, match="sweep=nothing: no such file; use one of .*saq_rho"):
        sweep_jobs("nothing")
    with pytest.raises(ValueError, match="sweep=train: .*; write key=value"):
        sweep_jobs("train", ["seed=["])
    (job,) = sweep_jobs("train", ["data=nothing"])
    assert job.folder is None and job.error is not None and job.error.startswith("data=nothing is unknown; use one of")


def test_plan_launch_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is planned is what is launched: every folder is found again, done, failed or held by someone else."""
    typed, runs = " ".join(GRID), str(tmp_path)
    plan.main("train", typed, runs)
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:7]] == ["missing", "refused", "missing"] * 2
    assert lines[2].endswith("model.width=4 seed=abc : seed='abc': use an integer")
    assert total == "6 jobs: 4 missing, 2 refused; no like run has finished: hours unknown"
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"

    jobs = sweep_jobs("train", GRID, runs)
    taken = jobs[0].folder
    assert taken is not None
    with taken.lock():
        done = command(train, "-m", *GRID, f"paths.runs={runs}")
    assert done.code == 2 and "Traceback" not in done.err
    assert f"skipped: run folder {taken.path} is in use by process" in done.out
    assert done.err.splitlines()[-2:] == [
        "error: job 1 (model.width=4 seed=abc): seed='abc': use an integer",
        "error: job 4 (model.width=8 seed=abc): seed='abc': use an integer",
    ]
    lines = status.report(status.of_sweep("train", typed, runs)).splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["missing", "failed", "done"] + ["done", "failed", "done"]
    assert lines[-1] == "6 jobs: 3 done, 0 running, 2 failed, 0 interrupted, 1 missing"

    plan.main("train", typed, runs)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[1:4] == ["missing", "0.00", "[1]"]
    assert any(line.startswith("[1] hours by the record of grid/") for line in table)

    again = command(train, "-m", *GRID, f"paths.runs={runs}")
    assert again.code == 2 and again.out.count("already done") == 3 and again.out.count("run folder ") == 1
    assert status.report(status.of_sweep("train", typed, runs)).splitlines()[0].startswith("done")


def test_a_job_that_fails_before_its_run_leaves_its_last_line(tmp_path: Path) -> None:
    grid = [*TINY, "trainer.max_epochs=1", "name=grid", "init_from=nowhere,null"]
    done = command(train, "-m", *grid, f"paths.runs={tmp_path}")
    assert done.code == 2
    lines = status.report(status.of_folders(f"{tmp_path}/grid/*")).splitlines()
    (failed,) = [line for line in lines if line.startswith("failed")]
    assert "init_from=nowhere: no .safetensors file" in failed
    assert lines[-1] == "2 jobs: 1 done, 0 running, 1 failed, 0 interrupted, 0 missing"


def test_what_only_building_refuses_shows_where_jobs_are_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = " ".join([*TINY, "name=grid", "init_from=nowhere,null"])
    plan.main("train", grid, str(tmp_path))
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 jobs: 2 missing;")
    plan.main("train", grid, str(tmp_path), build=True)
    _, refused, _, _, total = capsys.readouterr().out.splitlines()
    assert refused.split()[1:3] == ["refused", "–"] and "init_from=nowhere: " in refused
    assert total.startswith("2 jobs: 1 missing, 1 refused;")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
