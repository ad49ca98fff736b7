"""Where runs come from: run folders, W&B's offline files, or a W&B project, behind one function."""

from __future__ import annotations

import glob
from pathlib import Path

from analysis.folder_source import FolderRun
from analysis.rows import Run

ONLINE = "wandb:"


def read_runs(where: str) -> list[Run]:
    """All finished runs of a source, ordered by folder; a run that is found twice counts once, as first found.

    Args:
        where: sources separated by commas. Each is a glob over run folders (``runs/*/*``), a glob over folders of W&B
            offline runs (``runs/*/*/wandb``, or the ``offline-run-*`` themselves), or ``wandb:<entity>/<project>``,
            which asks W&B's server.

    Raises:
        ValueError: a source without a finished run, or a damaged record.
    """
    runs: list[Run] = []
    for part in where.split(","):
        found = _online(part) if part.startswith(ONLINE) else _local(part)
        if not found:
            raise ValueError(f"runs={part}: no finished run there; give a glob over run folders such as 'runs/*/*'")
        runs += found
    unique: dict[tuple[str, str], Run] = {}
    for run in runs:
        unique.setdefault((run.rows[0]["experiment"], run.rows[0]["hash"]), run)
    return list(unique.values())


def _local(pattern: str) -> list[Run]:
    """Run folders, and W&B's files only from folders that are none."""
    runs: list[Run] = []
    files: list[Path] = []
    for path in (Path(found) for found in sorted(glob.glob(pattern))):
        if (path / "summary.json").is_file():
            runs.append(FolderRun(path))
        elif path.is_dir() and not (path / "config.yaml").is_file():
            from analysis.wandb_source import offline_files

            files += offline_files(path)
    if files:
        from analysis.wandb_source import offline_runs

        runs += offline_runs(files)
    return runs


def _online(part: str) -> list[Run]:
    from analysis.wandb_source import online_runs

    return list(online_runs(part.removeprefix(ONLINE)))
