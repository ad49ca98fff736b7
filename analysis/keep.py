"""Keep the records of finished runs: ``python -m analysis.keep runs=GLOB [output=docs/results/records]``.

Copies what is small and says everything (configuration, environment, metrics, summary, table, and, where there are
such, the widths that a search found and the record of a post-training quantization), no weights.
"""

from __future__ import annotations

from pathlib import Path

from analysis.cli import REQUIRED, script
from analysis.collect import collect
from research.runs.allocation import ALLOCATION
from research.runs.files import atomic_write_bytes
from research.runs.folder import RunFolder
from research.runs.ptq import ptq_path

RECORDS = "docs/results/records"


def keep(folder: RunFolder, output: Path) -> Path:
    """Copy the record of a finished run to ``output/<experiment>/<hash>``; the new folder."""
    place = output / folder.experiment / folder.hash
    place.mkdir(parents=True, exist_ok=True)
    paths = [
        folder.config_path,
        folder.overrides_path,
        folder.environment_path,
        folder.metrics_path,
        folder.table_path,
        folder.summary_path,
    ]
    paths += [path for path in (folder.path / ALLOCATION, ptq_path(folder)) if path.is_file()]
    paths += sorted(folder.measurements.glob("*.json"))
    for path in paths:
        atomic_write_bytes(place / path.relative_to(folder.path), path.read_bytes())
    return place


def main(runs: str, output: str) -> None:
    """Keep every finished run that matches.

    Args:
        runs: glob over run folders.
        output: folder of the records.
    """
    for path in dict.fromkeys(row["path"] for row in collect(runs)):
        print(keep(RunFolder.existing(path), Path(output)))


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "output": RECORDS})
