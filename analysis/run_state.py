"""Where a run stands, read from its folder: finished, running, failed, interrupted or not begun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from research.runs.failure import read_failure
from research.runs.folder import RunFolder

DONE, RUNNING, FAILED, INTERRUPTED, MISSING = "done", "running", "failed", "interrupted", "missing"
STATES = (DONE, RUNNING, FAILED, INTERRUPTED, MISSING)

_TAIL = 4096  # bytes that hold the last rows of a metrics record


class RunState(NamedTuple):
    """One of ``STATES``, and a line about it: the failure's last line, or how far training came."""

    state: str
    detail: str = ""


def run_state(folder: RunFolder) -> RunState:
    """The state of a run folder, which need not exist; nothing of it is imported, locked or changed for longer.

    ``running``: a live process holds the folder. ``failed``: the last attempt ended by an error. ``interrupted``: it
    was stopped or killed; the same command goes on from the last checkpoint, if there is one.
    """
    if folder.finished:
        return RunState(DONE)
    if folder.held:
        return RunState(RUNNING, progress(folder))
    failure = read_failure(folder.path)
    if failure is not None:
        return RunState(FAILED, failure["error"])
    if not folder.config_path.is_file():
        return RunState(MISSING)
    last = folder.checkpoints / "last.ckpt"
    kept = progress(folder) if last.is_file() else "no checkpoint yet"
    return RunState(INTERRUPTED, kept)


def progress(folder: RunFolder) -> str:
    """How far the metrics record goes, such as ``epoch 3, step 1200`` (both counted from 1)."""
    place = last_place(folder)
    if place is None:
        return "before the first logged step"
    epoch, step = place
    return f"step {step + 1}" if epoch is None else f"epoch {epoch + 1}, step {step + 1}"


def last_place(folder: RunFolder) -> tuple[int | None, int] | None:
    """Epoch and step (from 0) of the last whole row of ``metrics.csv``; None where there is none."""
    if not folder.metrics_path.is_file():
        return None
    with folder.metrics_path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        text = file.read().decode()
    for line in reversed(text[: text.rfind("\n") + 1].splitlines()):
        step, _, rest = line.partition(",")
        if step.isdigit():
            epoch = rest.partition(",")[0]
            return (int(epoch) if epoch else None), int(step)
    return None


def folder_at(path: Path) -> RunFolder:
    """The run folder at a path ``.../<experiment>/<hash>``, by its names alone: nothing is read."""
    path = path.absolute()
    return RunFolder(path, path.parent.name, path.name)
