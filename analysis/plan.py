"""A sweep before it is launched: ``python -m analysis.plan sweep=NAME [overrides='a=1 b=2,3'] [runs=DIR]``.

Prints every job with its run folder, where it stands, and how long it should take by the record of a like run. Nothing
is trained, nothing written among the runs. Every configuration is composed and checked; with ``build=true`` data and
network are built as well, so that what only they refuse shows: a table that does not fit, mechanics that exclude each
other, data that is not there.
"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from analysis.cli import script
from analysis.duration import Durations, Estimate
from analysis.keep import RECORDS
from analysis.run_state import DONE, FAILED, STATES, last_place, run_state
from analysis.sweep_jobs import Job, sweep_jobs
from research.error_line import USER_ERRORS, error_line
from research.train import build as build_job

REFUSED = "refused"


def table(jobs: list[Job], durations: Durations, build: bool = False) -> str:
    """The job table, the runs that its hours come from, and the totals."""
    lines, sources, states = [], dict[str, str](), Counter[str]()
    hours, unknown = 0.0, 0
    for number, job in enumerate(jobs):
        state, estimate, note = _standing(job, durations, build)
        states[state] += 1
        shown = "–" if state in (DONE, REFUSED) else "unknown"
        if estimate is not None:
            source = estimate.source
            mark = sources.setdefault(f"{source.name} ({source.hardware})", f"[{len(sources) + 1}]")
            shown = f"{estimate.seconds / 3600:.2f} {mark}"
            hours += estimate.seconds / 3600
        unknown += shown == "unknown"
        where = "–" if job.folder is None else f"{job.folder.experiment}/{job.folder.hash}"
        lines.append((str(number), state, shown, where, " ".join([*job.overrides, note])))
    header = ("job", "state", "hours", "run folder", "swept")
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(4)]
    rows = [f"{'  '.join(f'{cell:<{w}}' for cell, w in zip(line, widths, strict=False))}  {line[4]}".rstrip()
            for line in [header, *lines]]  # fmt: skip
    counts = ", ".join(f"{states[state]} {state}" for state in (*STATES, REFUSED) if states[state])
    total = f"about {hours:.2f} h of training one after another" + (f", {unknown} unknown" if unknown else "")
    if unknown and not hours:
        total = "no like run has finished: hours unknown"
    origin = [f"{mark} hours by the record of {name}" for name, mark in sources.items()]
    return "\n".join([*rows, "", *origin, f"{len(jobs)} jobs: {counts}; {total}"])


def _standing(job: Job, durations: Durations, build: bool) -> tuple[str, Estimate | None, str]:
    """State of a job, the time that it still takes, and what there is to say about it."""
    if job.folder is None or job.config is None:
        return REFUSED, None, f": {job.error}"
    state = run_state(job.folder)
    if state.state == DONE:
        return DONE, None, ""
    if build:
        try:
            build_job(job.config)
        except USER_ERRORS as error:
            return REFUSED, None, f": {error_line(error)}"
    checkpoint = (job.folder.checkpoints / "last.ckpt").is_file()
    place = last_place(job.folder) if checkpoint else None
    estimate = durations.estimate(job.config, 0 if place is None else place[1] + 1)
    if state.state == FAILED:
        return FAILED, estimate, f": {state.detail}"
    return state.state, estimate, f"({state.detail})" if state.detail else ""


def main(sweep: str, overrides: str, runs: str | None, build: bool = False) -> None:
    """Print the plan of a sweep.

    Args:
        sweep: file of ``sweeps/``, path of another one, or ``train`` (a grid of overrides alone).
        overrides: further overrides, as on the command line.
        runs: folder of the runs, as ``paths.runs``.
        build: build data and network of every job that is not done, about a second each for a small one.
    """
    jobs = sweep_jobs(sweep, shlex.split(overrides), runs)
    roots = dict.fromkeys(job.folder.path.parents[1] for job in jobs if job.folder is not None)
    print(table(jobs, Durations([*roots, Path(RECORDS)]), build))


if __name__ == "__main__":
    script(main, {"sweep": "train", "overrides": "", "runs": None, "build": False})
