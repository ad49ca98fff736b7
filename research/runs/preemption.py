"""Pre-emption and time limits: a signal ends training where the run can go on exactly, then SLURM starts it again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from research.runs.checkpoint import RunCheckpoint

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM's warning before it kills a job, and the two that a job can ask for ahead of it (submitit asks for USR2)."""

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Training ended by a signal, with `last.ckpt` written; the exit code is the shell's, 128 + the signal's number."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.number = number


class StopOnSignal(Callback):
    """Ends training after a signal of `STOP_SIGNALS`, on all ranks together, once `checkpoint` has saved the step.

    A handler only notes the signal. It is acted upon at the next batch from which a resumed run is bit-equal, so the
    notice that the cluster gives has to cover a batch or, where one is running, a validation. Lightning's own answers
    (SIGTERM ends without a checkpoint; USR1 saves an `hpc_ckpt` of its own and requeues at once) are replaced.
    """

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self.stopping = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch Lightning's own requeue off, before it puts its handlers up."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; Lightning puts back the handlers from before the fit, however that ends."""
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other thread
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks, and ask for a checkpoint at the next possible step."""
        if not self.stopping and self._agreed(trainer):
            self.stopping = True
            self.checkpoint.request()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave before the first batch behind the checkpoint: what its step logged is in the record by now."""
        if self.stopping and self.checkpoint.saved_step == trainer.global_step:
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave behind the last epoch's checkpoint: testing and deployment are for the next start."""
        if self.stopping or self._agreed(trainer):
            self._leave(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def _agreed(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def _leave(self, trainer: Trainer) -> None:
        number = self.received or signal.SIGTERM  # none here where another rank got it
        if trainer.is_global_zero:
            log.info("%s: training stopped at step %d, behind its checkpoint", number.name, trainer.global_step)
        raise Stopped(number)


@contextmanager
def requeued_when_stopped() -> Iterator[None]:
    """Around a run: when it was `Stopped`, and everything is closed, see to it that SLURM starts it again.

    The handler from before the run comes first: submitit's requeues its job for the signal that it asked for, up to
    `max_num_timeout` times, and ends the process. Otherwise a SLURM job is requeued that SLURM still holds as running,
    so one that is being cancelled or that SLURM requeues itself is left alone. The first rank does this for all.
    """
    try:
        yield
    except Stopped as stopped:
        if getattr(rank_zero_only, "rank", 0) != 0:
            raise SystemExit(0) from None  # launchers kill the first rank, at its work here, when another one fails
        handler = signal.getsignal(stopped.number)
        if callable(handler):
            handler(stopped.number, None)
        job = slurm_job()
        if job is not None and slurm_state(job) == "RUNNING":
            requeue(job)
        raise


def slurm_job() -> str | None:
    """What SLURM calls this job, or None outside of SLURM; of an array only this task."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def slurm_state(job: str) -> str:
    """SLURM's word for the state of `job`; empty where it cannot be asked."""
    return _slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}").stdout.strip()


def requeue(job: str) -> None:
    """Ask SLURM to start `job` again later; a refusal (interactive jobs, `--no-requeue`) is logged."""
    answer = _slurm("scontrol", "requeue", job)
    if answer.returncode == 0:
        log.info("SLURM job %s requeued", job)
    else:
        log.warning("SLURM job %s is not requeued (%s): start the same command again", job, answer.stderr.strip())


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:  # a container without SLURM's commands
        return subprocess.CompletedProcess(command, 127, "", str(error))
