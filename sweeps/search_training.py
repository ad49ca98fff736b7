"""One training of a search: `python -m research.train` as a process of its own, and what its run folder says."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

COMMAND = (sys.executable, "-m", "research.train")
GRACE = 60
"""Seconds that a training gets to end when it is told to."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""By which clusters end a job; a training answers with a checkpoint, and has SLURM start its job again."""


class Training:
    """A running training. Leaving the context ends it, by the signal that ends this process if there is one.

    Its run folder can go on later.

    Args:
        overrides: of its command line.
        log: file that its output is added to.
        lock: descriptor that it inherits and so keeps open until it ends.
    """

    def __init__(self, overrides: Sequence[str], log: Path, lock: int) -> None:
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*COMMAND, *overrides], stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,)
            )

    def __enter__(self) -> Training:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the training."""
        stop = [number for number in STOP_SIGNALS if isinstance(error, SystemExit) and error.code == 128 + number]
        self.end(*stop)

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for its end; whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, number: signal.Signals = signal.SIGINT) -> None:
        """End the process where it still runs, as Ctrl-C does or by another signal, and wait for its end."""
        self._process.send_signal(number)
        if not self.ended(GRACE):
            self._process.kill()
            self._process.wait()

    @property
    def stopped(self) -> int | None:
        """The exit code of a training that was ended by one of `STOP_SIGNALS`, None where it was not."""
        code = self._process.returncode
        return next((128 + number for number in STOP_SIGNALS if code in (128 + number, -number)), None)

    @property
    def failure(self) -> str | None:
        """None for a training that ended well, else the last line that it printed, or the signal that killed it."""
        code = self._process.returncode
        if code == 0:
            return None
        lines = [line.strip() for line in self._output().splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {code}"
        return f"killed by signal {-code}" if code < 0 else last

    @property
    def folder(self) -> Path | None:
        """The run folder, as soon as the training has printed it."""
        found = re.findall(r"^(?:run folder|already done:) (.+)$", self._output(), flags=re.MULTILINE)
        return Path(found[-1]) if found else None

    def _output(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


def metric(folder: Path, name: str) -> dict[int, float]:
    """Values of a metric by epoch, as far as the run has come; a line that is being written is left out."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    text = path.read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return {int(row["epoch"]): float(row["value"]) for row in rows if row["name"] == name and row["epoch"]}


def last_epoch(folder: Path) -> int:
    """The last epoch, from 0, that the run's config asks for."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return int(config["trainer"]["max_epochs"]) - 1


def objective(folder: Path, name: str) -> float:
    """The value of an objective of a finished run.

    Args:
        folder: its run folder.
        name: a metric (with a slash), whose last value counts, or a field of the first deployment's summary.

    Raises:
        ValueError: the run has no such number, naming those that it has.
    """
    if "/" in name:
        values = metric(folder, name)
        if not values:
            raise ValueError(f"search.objectives.{name}: {folder} has no such metric; see its metrics.csv")
        return values[max(values)]
    row = json.loads((folder / "summary.json").read_text())["deployments"][0]
    numbers = {key: value for key, value in row.items() if type(value) in (int, float) and math.isfinite(value)}
    if name not in numbers:
        raise ValueError(f"search.objectives.{name}: not in the summary of {folder}; use {', '.join(numbers)}")
    return float(numbers[name])
