"""What a failed job leaves: `failure.json` with the time, the last line, the overrides and the traceback."""

import json
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research.runs.records import write_json

SCHEMA = 1
NAME = "failure.json"


class JobFailed(Exception):
    """A job's error as text: `line`, and `traceback`; every launcher can bring it back from another process."""

    def __init__(self, line: str, traceback: str) -> None:
        super().__init__(line, traceback)
        self.line = line
        self.traceback = traceback

    def __str__(self) -> str:
        return self.line

    @classmethod
    def by(cls, error: Exception) -> "JobFailed":
        """The text of an error; one that no user can cause is introduced by its type."""
        from research.error_line import USER_ERRORS, error_line  # imports Lightning, for which readers do not wait

        line = error_line(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error_line(error)}"
        return cls(line, "".join(traceback.format_exception(error)))


def write_failure(folder: Path, failure: JobFailed, overrides: Sequence[str] = ()) -> None:
    """Write the record of a failure into a folder, made where missing."""
    record = {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": failure.line,
        "overrides": list(overrides),
        "traceback": failure.traceback.splitlines(),
    }
    write_json(folder / NAME, record)


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The record of the failure in a folder, None where there is none.

    Raises ValueError for a torn record or one of another schema.
    """
    path = folder / NAME
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt: delete it") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of a failure of schema {SCHEMA}: delete it")
    return record


def clear_failure(folder: Path) -> None:
    """Forget the failure of an earlier attempt."""
    (folder / NAME).unlink(missing_ok=True)
