"""A signal ends training behind a checkpoint, closes the run, and asks SLURM (here: two scripts) to start it again."""

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from research.learning.mechanic import Mechanic
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder
from research.runs.preemption import STOP_SIGNALS, Stopped, requeued_when_stopped
from research.train import main as train
from tests.test_bad_input import STEPS_PER_EPOCH, TINY, Outcome, command, contents, run_folder

BATCHES = 3 * STEPS_PER_EPOCH
NOTICE = f"+callbacks.notice={{_target_: {__name__}.Notice}}"


class Notice(Mechanic):
    """Sends this process a signal during a batch, counted over all epochs, while one is armed."""

    slug = "notice"
    armed: tuple[int, signal.Signals] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.armed is not None and self.armed[0] == trainer.current_epoch * STEPS_PER_EPOCH + batch_idx:
            os.kill(os.getpid(), self.armed[1])


def start(runs: Path, *more: str) -> Outcome:
    return command(train, *TINY, "trainer.log_every_n_steps=1", NOTICE, f"paths.runs={runs}", *more)


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Arms the mechanic."""
    return lambda batch, number: monkeypatch.setattr(Notice, "armed", (batch, number))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """The files of the undisturbed run with given overrides."""

    @cache
    def files(*more: str) -> dict[str, bytes]:
        runs = tmp_path_factory.mktemp("whole")
        assert start(runs, *more).code == 0
        return contents(run_folder(runs))

    return files


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts `squeue` and `scontrol` on the path, in task 3 of array 7; gives the file where they note their calls."""

    def install(state: str, refusal: str = "") -> Path:
        calls, folder = tmp_path / "calls", tmp_path / "bin"
        folder.mkdir()
        (folder / "squeue").write_text(f'#!/bin/sh\necho squeue "$@" >>{calls}\necho {state}\n')
        end = f"echo {refusal} >&2; exit 1" if refusal else "exit 0"
        (folder / "scontrol").write_text(f'#!/bin/sh\necho scontrol "$@" >>{calls}\n{end}\n')
        for script in folder.iterdir():
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name, value in (("JOB_ID", "11"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3"), ("NTASKS", "1")):
            monkeypatch.setenv(f"SLURM_{name}", value)
        return calls

    return install


ACCUMULATED = "trainer.accumulate_grad_batches=2"
POINTS = {
    "within an epoch": (5, (), 6),
    "where validation follows": (5, ("+trainer.val_check_interval=2",), 7),
    "after accumulated batches": (5, (ACCUMULATED,), 3),
    "between accumulated batches": (6, (ACCUMULATED,), 4),
    "between them, behind an epoch's checkpoint": (4, (ACCUMULATED,), 2),
    "the epoch's last batch": (7, (), 8),
    "the last batch of all": (BATCHES - 1, (), BATCHES),
}


@pytest.mark.parametrize(("batch", "more", "step"), POINTS.values(), ids=POINTS.keys())
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    notice: Callable[[int, signal.Signals], None],
    whole: Callable[..., dict[str, bytes]],
    batch: int,
    more: tuple[str, ...],
    step: int,
) -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    notice(batch, signal.SIGUSR2)
    stopped = start(tmp_path, *more)
    assert stopped.code == 128 + signal.SIGUSR2
    assert f"SIGUSR2: training stopped at step {step}, behind its checkpoint" in stopped.out
    folder = run_folder(tmp_path)
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == step
    assert not (folder / "summary.json").exists()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    monkeypatch.setattr(Notice, "armed", None)
    assert start(tmp_path, *more).code == 0
    expected, found = whole(*more), contents(folder)
    for file in ("final.safetensors", "metrics.csv"):
        assert found[file] == expected[file], file


def test_the_handler_from_before_the_run_gets_the_signal_of_a_closed_run(
    tmp_path: Path, notice: Callable[[int, signal.Signals], None]
) -> None:
    """What submitit's handler is: it requeues its job and ends the process."""

    def handler(number: int, frame: object) -> None:
        path = run_folder(tmp_path)
        with RunFolder(path, path.parent.name, path.name).lock():
            raise SystemExit(77)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        notice(5, signal.SIGUSR2)
        assert start(tmp_path).code == 77
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_is_asked_once_and_lightning_asks_for_nothing(
    tmp_path: Path,
    notice: Callable[[int, signal.Signals], None],
    slurm: Callable[..., Path],
    number: signal.Signals,
) -> None:
    calls = slurm("RUNNING")
    notice(5, number)
    assert start(tmp_path / "runs").code == 128 + number
    assert calls.read_text().splitlines() == ["squeue --noheader --format=%T --jobs=7_3", "scontrol requeue 7_3"]
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def stop() -> int:
    with pytest.raises(SystemExit) as end, requeued_when_stopped():
        raise Stopped(signal.SIGTERM)
    return int(end.value.code or 0)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_ends_itself_is_left_alone(slurm: Callable[..., Path], state: str) -> None:
    calls = slurm(state)
    assert stop() == 128 + signal.SIGTERM
    assert "scontrol" not in calls.read_text()


def test_a_refusal_is_told(slurm: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    slurm("RUNNING", refusal="Requested operation is presently disabled")
    assert stop() == 128 + signal.SIGTERM
    assert "job 7_3 is not requeued (Requested operation is presently disabled)" in caplog.text


def test_without_slurm_nobody_is_asked(slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slurm("RUNNING")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name)
    assert stop() == 128 + signal.SIGTERM and not calls.exists()


def test_a_container_without_slurms_commands_only_stops(
    slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm("RUNNING")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stop() == 128 + signal.SIGTERM


def test_the_first_rank_asks_for_all(slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slurm("RUNNING")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert stop() == 0 and not calls.exists()
