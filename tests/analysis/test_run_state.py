"""States of run folders, the status report, and its speed over 1,000 finished runs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import status
from analysis.run_state import DONE, FAILED, INTERRUPTED, MISSING, RUNNING, folder_at, last_place, run_state
from research.runs.failure import JobFailed, read_failure, write_failure
from research.runs.folder import FolderInUse, RunFolder
from research.runs.records import MetricsRecord, write_config, write_summary

ROOT = Path(__file__).resolve().parents[2]


def make_run(root: Path, seed: int, finished: bool = False, steps: int = 0) -> RunFolder:
    """A run folder by the real record writers, as far as training came."""
    config = {"name": "lsq", "seed": seed}
    folder = RunFolder.of(root, "lsq", config)
    write_config(folder.config_path, config)
    write_config(folder.overrides_path, [f"seed={seed}"])
    record = MetricsRecord(folder.metrics_path)
    for step in range(steps):
        record.append(step, step // 4, {"train/loss": 1.0, "train/accuracy": 0.5})
    record.close()
    if steps:
        folder.checkpoints.mkdir()
        (folder.checkpoints / "last.ckpt").write_bytes(b"a checkpoint")
    if finished:
        write_summary(folder, seed, [{"name": "final", "accuracy": 0.9}])
    return folder


def test_the_five_states(tmp_path: Path) -> None:
    assert run_state(make_run(tmp_path, 0, finished=True)) == (DONE, "")
    assert run_state(RunFolder.of(tmp_path, "lsq", {"seed": 9})) == (MISSING, "")
    assert run_state(make_run(tmp_path, 1)) == (INTERRUPTED, "no checkpoint yet")
    begun = make_run(tmp_path, 2, steps=7)
    assert run_state(begun) == (INTERRUPTED, "epoch 2, step 7")
    with begun.lock():
        assert run_state(begun) == (RUNNING, "epoch 2, step 7")
    with pytest.raises(RuntimeError), begun.lock():
        raise RuntimeError("no room\non the device")
    assert run_state(begun) == (FAILED, "RuntimeError: no room on the device")
    with begun.lock():
        assert run_state(begun).state == RUNNING
    assert run_state(begun).state == INTERRUPTED, "a new attempt forgets the failure of the last one"
    assert folder_at(begun.path) == begun


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    folder = make_run(tmp_path, 0, steps=1)
    for end in (KeyboardInterrupt, SystemExit):
        with pytest.raises(end), folder.lock():
            raise end
        assert run_state(folder) == (INTERRUPTED, "epoch 1, step 1")


def test_a_killed_holder_is_no_holder(tmp_path: Path) -> None:
    folder = make_run(tmp_path, 0)
    code = (
        "import os, signal; from research.runs.folder import RunFolder;"
        f"lock = RunFolder.of({str(tmp_path)!r}, 'lsq', {{'name': 'lsq', 'seed': 0}}).lock(); lock.__enter__();"
        "print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.stdout == "held\n" and killed.returncode == -9, killed.stderr
    assert (folder.path / ".lock").read_text().strip().isdigit(), "its process id is still there"
    assert not folder.held and run_state(folder).state == INTERRUPTED


def test_a_second_holder_is_refused_and_a_glance_is_not_in_the_way(tmp_path: Path) -> None:
    folder = make_run(tmp_path, 0)
    with folder.lock():
        assert folder.held
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"), folder.lock():
            pass
        assert folder.held
    assert not folder.held


def test_the_last_place_is_that_of_the_last_whole_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path, 0, steps=400)
    assert last_place(folder) == (99, 399)
    with folder.metrics_path.open("a") as file:
        file.write("400,100,train/lo")
    assert last_place(folder) == (99, 399)
    folder.metrics_path.write_text("step,epoch,name,value\n3,,train/loss,0.5\n")
    assert last_place(folder) == (None, 3)
    folder.metrics_path.write_text("step,epoch,name,value\n")
    assert last_place(folder) is None


def test_a_record_of_a_failure_reads_back(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    try:
        raise ValueError("optimizer.lr='fast': use a number")
    except ValueError as error:
        write_failure(tmp_path, JobFailed.by(error), ["optimizer.lr=fast"])
    record = read_failure(tmp_path)
    assert record is not None
    assert (record["error"], record["overrides"]) == ("optimizer.lr='fast': use a number", ["optimizer.lr=fast"])
    assert record["traceback"][-1] == "ValueError: optimizer.lr='fast': use a number"
    (tmp_path / "failure.json").write_text('{"schema"')
    with pytest.raises(ValueError, match="failure.json is truncated or corrupt: delete it"):
        read_failure(tmp_path)


def test_status_has_a_line_for_every_folder(tmp_path: Path) -> None:
    make_run(tmp_path, 0, finished=True)
    failed = make_run(tmp_path, 1)
    write_failure(failed.path, JobFailed("no data", ""))
    *lines, counts = status.report(status.of_folders(f"{tmp_path}/*/*")).splitlines()
    assert [line for line in lines if "seed=0" in line][0].startswith("done ")
    (line,) = [line for line in lines if "seed=1" in line]
    assert line.startswith("failed ") and f"lsq/{failed.hash}" in line and line.endswith("seed=1: no data")
    assert counts == "2 jobs: 1 done, 0 running, 1 failed, 0 interrupted, 0 missing"
    made = [folder for folder in sorted(tmp_path.glob("*/*")) if folder.is_dir()]
    assert status.of_folders(",".join(map(str, [*made, *made]))) == status.of_folders(f"{tmp_path}/*/*")
    with pytest.raises(ValueError, match="runs=nowhere: no run folder there; give a glob"):
        status.of_folders("nowhere")


@pytest.mark.slow
def test_a_thousand_finished_runs_in_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for seed in range(1000):
        make_run(tmp_path, seed, finished=True, steps=2)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "analysis.status", f"runs={tmp_path}/*/*"], cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "1000 jobs: 1000 done, 0 running, 0 failed, 0 interrupted, 0 missing"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # whatever else the machine does
    assert seconds < 2.5, seconds
