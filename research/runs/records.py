"""Records of a run: `config.yaml`, `metrics.csv` (tidy, append-only) and `summary.json` (last, atomic)."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from research.runs.files import atomic_write_text, writing

if TYPE_CHECKING:
    from research.runs.folder import RunFolder

SUMMARY_SCHEMA = 1
_COLUMNS = ("step", "epoch", "name", "value")


def write_config(path: Path, config: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a plain config (or a list of overrides) as YAML, keys in their own order."""
    atomic_write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML config into plain containers. Raises ValueError for a file that holds no mapping."""
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config: expected `key: value` lines")
    return config


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")


def write_summary(
    folder: "RunFolder", seed: int, rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None = None
) -> None:
    """Seal the run: one row (`name` and its metrics) per deployment, and `extra` top-level fields. Call it last."""
    identity = {"schema": SUMMARY_SCHEMA, "experiment": folder.experiment, "hash": folder.hash, "seed": seed}
    write_json(folder.summary_path, {**identity, "deployments": [dict(row) for row in rows], **(extra or {})})


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary. Raises ValueError where the file is missing, torn or of another schema."""
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no summary of a finished run: {error}") from error
    if not isinstance(summary, dict) or summary.get("schema") != SUMMARY_SCHEMA or not summary.get("deployments"):
        raise ValueError(f"{path} is no summary of a finished run: expected schema {SUMMARY_SCHEMA} with deployments")
    return summary


class Metric(NamedTuple):
    """One row of `metrics.csv`; `step` counts optimizer steps from 0, `epoch` is None where there is none."""

    step: int
    epoch: int | None
    name: str
    value: float


class MetricsRecord:
    """Append-only `metrics.csv` with columns step, epoch, name, value; every float reads back exactly."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, with its header if it is new."""
        self.path = path
        with writing(path.parent):
            if not path.exists() or path.stat().st_size == 0:
                atomic_write_text(path, ",".join(_COLUMNS) + "\n")
            self._file = path.open("a", newline="")

    def append(self, step: int, epoch: int | None, metrics: Mapping[str, float]) -> None:
        """Add one row per metric in a single write, and hand it to the operating system at once."""
        with writing(self.path.parent):
            self._file.write(_lines(Metric(step, epoch, name, float(value)) for name, value in metrics.items()))
            self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps after `step`, and a last line that a kill tore; the resumed run writes them again."""
        self._file.close()
        kept = [row for row in read_metrics(self.path) if row.step <= step]
        atomic_write_text(self.path, ",".join(_COLUMNS) + "\n" + _lines(kept))
        with writing(self.path.parent):
            self._file = self.path.open("a", newline="")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Metric]:
    """All whole rows of `metrics.csv`. Raises ValueError for a file with other columns."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    header, *rows = csv.reader(io.StringIO(whole)) if whole else [[]]
    if tuple(header) != _COLUMNS:
        raise ValueError(f"{path} is no metrics record: expected the columns {','.join(_COLUMNS)}")
    return [Metric(int(step), int(epoch) if epoch else None, name, float(value)) for step, epoch, name, value in rows]


def _lines(rows: Iterable[Metric]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows((r.step, "" if r.epoch is None else r.epoch, r.name, repr(r.value)) for r in rows)
    return buffer.getvalue()
