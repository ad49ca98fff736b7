"""Checkpoints that survive `kill -9`: verified files, the newest valid one, and the callback that saves them.

A checkpoint is a plain `torch.save` archive. The archive carries a CRC-32 of every record and ends with its table of
contents, so a file verifies itself: truncation loses the table, a flipped bit breaks a sum; no second file is needed.
"""

import io
import logging
import math
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from research.runs.files import atomic_write_bytes

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
WHOLE = False
"""What `Trainer.save_checkpoint` calls `weights_only`: loops, optimizer and generators are saved as well."""
_TABLE_END = b"PK\x05\x06"  # starts the 22 bytes that close a zip archive without a comment

log = logging.getLogger(__name__)


def damage(path: Path) -> str | None:
    """What is wrong with the archive at `path` ("truncated", "corrupt"), or None where every sum agrees."""
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "corrupt"
    except zipfile.BadZipFile:
        return "corrupt" if path.read_bytes()[-22:].startswith(_TABLE_END) else "truncated"


def load_checkpoint(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """Verify and read a checkpoint, never through unrestricted pickle.

    Raises ValueError where the file is missing, damaged, or holds more than plain containers and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if problem := damage(path):
        raise ValueError(f"checkpoint {path} is {problem}; use {PREVIOUS} or {BEST} beside it, or train again")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint {path} is refused: it is not a torch archive of plain containers and tensors"
        ) from error
    return checkpoint


def load_newest(folder: Path) -> Path | None:
    """Path of the newest valid checkpoint to resume from: `last.ckpt`, else `previous.ckpt` with a warning, else None.

    Raises ValueError where there are checkpoints and none is valid.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if last.exists() and damage(last) is None:
        return last
    if not last.exists() and not previous.exists():
        return None
    problem = damage(last) if last.exists() else "missing"
    if not previous.exists() or damage(previous) is not None:
        state = damage(previous) if previous.exists() else "missing"
        raise ValueError(
            f"{last} is {problem} and {PREVIOUS} is {state}: nothing to resume from; "
            f"delete {folder} to train from the start"
        )
    step = load_checkpoint(previous)["global_step"]
    log.warning("%s is %s: falling back to %s (step %d)", LAST, problem, PREVIOUS, step)
    return previous


class VerifiedCheckpointIO(CheckpointIO):
    """Checkpoint files that are whole or absent, and the one before `last.ckpt` kept as `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint atomically; one that could not be read back is refused before anything is replaced.

        A damaged `last.ckpt` never becomes `previous.ckpt`, so that one valid file exists at every moment. Raises
        ValueError for state that is more than plain containers and tensors, and where the folder cannot be written.
        """
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="cpu", weights_only=True, mmap=False)
        except UnpicklingError as error:
            raise ValueError(
                f"{path.name}: the state to save holds objects that a checkpoint may not; "
                f"use plain containers and tensors in state_dict() and hyper-parameters ({_named_object(error)})"
            ) from error
        keep = path.name == LAST and path.exists() and damage(path) is None
        atomic_write_bytes(path, buffer.getvalue(), previous=path.with_name(PREVIOUS) if keep else None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Verify and read a checkpoint; always with `weights_only=True`, whatever is asked."""
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file."""
        Path(path).unlink(missing_ok=True)


def _named_object(error: UnpicklingError) -> str:
    """The sentence of torch's long message that names the refused object."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt` at every epoch's end and every `every_n_steps` steps, and `best.ckpt` by a validation metric.

    The epoch's checkpoint holds that epoch's validation and schedule. A step's checkpoint is taken where the resumed
    run continues exactly: after an optimizer step (never between accumulated batches), and one step later where
    validation or the epoch's end follows, which a run resumed there would skip. Everything that moves the
    model must have moved before callbacks get `on_train_batch_end`.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps={every_n_steps}: use a positive number, or null for none")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode={mode}: use min or max")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self.saved_step = 0
        self._seen_step = 0
        self._requested = False

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score of the checkpoint."""
        self.best_score = state_dict["best_score"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where this process starts."""
        self._seen_step = self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a step's checkpoint is due and a run can be resumed exactly."""
        stepped = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        since = trainer.global_step - self.saved_step
        due = self._requested or (self.every_n_steps is not None and since >= self.every_n_steps)
        if due and stepped and not trainer.is_last_batch and not _validation_follows(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `best.ckpt` where the monitored metric is better than ever. Raises ValueError if nobody logs it."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"checkpoint.monitor={self.monitor} is not logged in validation; use one of: {logged}")
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if math.isnan(score):
            return
        if self.best_score is None or (score > self.best_score if self.mode == "max" else score < self.best_score):
            self.best_score = score
            trainer.save_checkpoint(self.folder / BEST, WHOLE)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch's checkpoint."""
        self._save_last(trainer)

    def request(self) -> None:
        """Make a step's checkpoint due now: `saved_step` says when it was written."""
        self._requested = True

    def _save_last(self, trainer: Trainer) -> None:
        self._requested = False
        trainer.save_checkpoint(self.folder / LAST, WHOLE)
        self.saved_step = trainer.global_step


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after the current batch (its own answer: no public one exists)."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
