"""How a sweep is doing: ``python -m analysis.status sweep=NAME [overrides='...'] [runs=DIR]`` or ``runs='runs/*/*'``.

One line a job, with the last line of its failure, then the counts. What is not ``done`` or ``running`` is repaired by
launching the same sweep again.
"""

from __future__ import annotations

import glob
import shlex
from collections import Counter
from pathlib import Path

from analysis.cli import script
from analysis.configurations import read_yaml
from analysis.run_state import FAILED, STATES, RunState, folder_at, run_state
from research.runs.folder import RunFolder

Line = tuple[str, RunState, str]
"""``<experiment>/<hash>``, its state, and what was swept or typed."""


def of_folders(pattern: str) -> list[Line]:
    """All run folders that match globs, separated by commas, whatever made them.

    Raises:
        ValueError: there is none.
    """
    paths = sorted({Path(path) for part in pattern.split(",") for path in glob.glob(part)})
    folders = [folder_at(path) for path in paths if (path / "config.yaml").is_file()]
    if not folders:
        raise ValueError(f"runs={pattern}: no run folder there; give a glob over run folders such as 'runs/*/*'")
    return [(f"{folder.experiment}/{folder.hash}", run_state(folder), _typed(folder)) for folder in folders]


def of_sweep(sweep: str, overrides: str, runs: str | None) -> list[Line]:
    """All jobs of a sweep, with those that have not begun; a configuration that is refused has failed."""
    from analysis.sweep_jobs import sweep_jobs  # composing needs the training's own imports

    lines = []
    for job in sweep_jobs(sweep, shlex.split(overrides), runs):
        swept = " ".join(job.overrides)
        if job.folder is None:
            lines.append(("–", RunState(FAILED, job.error or ""), swept))
        else:
            lines.append((f"{job.folder.experiment}/{job.folder.hash}", run_state(job.folder), swept))
    return lines


def report(lines: list[Line]) -> str:
    """One line a job and the counts of all states."""
    width = max(len(name) for name, _, _ in lines)
    rows = []
    for name, state, overrides in lines:
        told = f"{overrides}: {state.detail}" if state.detail else overrides
        rows.append(f"{state.state:<{max(map(len, STATES))}}  {name:<{width}}  {told}".rstrip())
    counts = Counter(state.state for _, state, _ in lines)
    return "\n".join([*rows, f"{len(lines)} jobs: " + ", ".join(f"{counts[state]} {state}" for state in STATES)])


def _typed(folder: RunFolder) -> str:
    if not folder.overrides_path.is_file():
        return ""
    return " ".join(read_yaml(folder.overrides_path) or [])


def main(sweep: str | None, overrides: str, runs: str | None) -> None:
    """Print the status.

    Args:
        sweep: the sweep, as for ``analysis.plan``; None for all run folders that match ``runs``.
        overrides: further overrides of the sweep.
        runs: glob over run folders or, with ``sweep``, the folder of the runs.
    """
    print(report(of_folders(runs or "runs/*/*") if sweep is None else of_sweep(sweep, overrides, runs)))


if __name__ == "__main__":
    script(main, {"sweep": None, "overrides": "", "runs": None})
