"""The run folder: `<paths.runs>/<experiment>/<hash of the resolved config>/`, one folder per configuration."""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from research.runs.failure import JobFailed, clear_failure, write_failure
from research.runs.files import writing
from research.runs.records import read_config, read_summary

NOT_IDENTITY = ("paths", "logger")
"""Top-level config keys that say where and how a run is shown, not what it computes."""

DISPLAY_OPTION = "enable_progress_bar"
"""The key under `trainer` that is of the same kind."""

LOCK_SECONDS = 0.5
"""How long a locked folder is asked for again: `held` of another process has it for a moment."""


class FolderInUse(ValueError):
    """Another live process holds the run folder."""


def config_hash(config: Mapping[str, Any]) -> str:
    """First 10 hex digits of the SHA-256 of a resolved plain config's canonical JSON, less what is only display."""
    identity = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if isinstance(identity.get("trainer"), Mapping):
        identity["trainer"] = {k: v for k, v in identity["trainer"].items() if k != DISPLAY_OPTION}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class RunFolder:
    """Names of everything that one run leaves behind."""

    path: Path
    experiment: str
    hash: str

    @classmethod
    def of(cls, root: Path | str, experiment: str, config: Mapping[str, Any]) -> "RunFolder":
        """The folder of this configuration, which need not exist; the same configuration always gives the same one.

        Raises ValueError, naming `name`, where that is no folder name.
        """
        if not re.fullmatch(r"\w[\w.+=-]*", experiment):
            raise ValueError(f"name={experiment!r} is not a folder name; use letters, digits, _ - . + = only")
        digest = config_hash(config)
        return cls(Path(root).absolute() / experiment / digest, experiment, digest)

    @classmethod
    def existing(cls, path: Path | str | None) -> "RunFolder":
        """The folder that an earlier run wrote (`run=DIR` of evaluate and export).

        Raises ValueError for None and where `config.yaml` is missing.
        """
        folder = None if path is None else Path(path).absolute()
        if folder is None or not (folder / "config.yaml").is_file():
            raise ValueError(
                f"run={path}: not a run folder (no config.yaml in it); give <paths.runs>/<experiment>/<hash>, "
                "the path that training printed"
            )
        return cls(folder, folder.parent.name, config_hash(read_config(folder / "config.yaml")))

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def overrides_path(self) -> Path:
        """The overrides of the command line."""
        return self.path / "overrides.yaml"

    @property
    def environment_path(self) -> Path:
        """The environment snapshot."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """The metrics record."""
        return self.path / "metrics.csv"

    @property
    def summary_path(self) -> Path:
        """The summary, one row per deployment; present only where the run finished."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt, previous.ckpt and best.ckpt."""
        return self.path / "checkpoints"

    @property
    def table_path(self) -> Path:
        """The resolved per-layer table of the recipe."""
        return self.path / "table.yaml"

    @property
    def artifact(self) -> Path:
        """Folder of the integer artifact."""
        return self.path / "artifact"

    @property
    def final(self) -> Path:
        """Weights of the finalised network."""
        return self.path / "final.safetensors"

    @property
    def measurements(self) -> Path:
        """Folder of what was measured on the finished run afterwards."""
        return self.path / "measurements"

    @property
    def wandb(self) -> Path:
        """Folder of the W&B run."""
        return self.path / "wandb"

    @property
    def finished(self) -> bool:
        """Whether a valid summary exists."""
        if not self.summary_path.is_file():
            return False
        try:
            return bool(read_summary(self.summary_path)["hash"] == self.hash)
        except ValueError:
            return False

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    @property
    def held(self) -> bool:
        """Whether a live process holds the folder."""
        try:
            with self._lock_path.open() as file:
                if not file.read().strip():
                    return False
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, made where missing, for this process; the kernel lets go of it however the process ends.

        What ends the block by an error is left in `failure.json`; a new attempt starts without that of the last one.

        Raises ValueError, naming `paths.runs` where the folder cannot be written, and FolderInUse with the holder's
        process id where another process has it.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_path.touch()
        with self._lock_path.open("r+") as file:
            self._acquire(file)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            clear_failure(self.path)
            try:
                yield
            except Exception as error:
                write_failure(self.path, JobFailed.by(error))
                raise
            finally:
                file.seek(0)
                file.truncate()

    def _acquire(self, file: TextIO) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    holder = file.read().strip() or "unknown"
                    raise FolderInUse(
                        f"run folder {self.path} is in use by process {holder}; wait for it, or change seed or name"
                    ) from error
                time.sleep(0.05)
