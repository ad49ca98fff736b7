"""Search with Optuna: ``python -m sweeps.optuna_search search=NAME [search.KEY=VALUE] [overrides of training]``.

Every trial is an ordinary training with a run folder of its own. Start the same command as often as there are
processors, on all machines that share the disk, and again after an interruption; with ``show`` in front of the
arguments it prints the trials and the best of them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import optuna
except ModuleNotFoundError:
    sys.exit("error: optuna is not installed: pip install -e '.[optuna]'")
from optuna.storages import JournalStorage
from optuna.trial import Trial, TrialState

from sweeps.search_definition import Search, override_key, read_search
from sweeps.search_study import FAILURE, RUN, TWIN, FileLock, SearchStudy, journal
from sweeps.search_training import STOP_SIGNALS, Training, last_epoch, metric, objective

POLL = 0.5
"""Seconds between two looks at a training, or at the trials of other workers."""

PRUNED = "pruned.txt"
"""The mark in the run folder of a trial that was given up; the same training started again goes on from there."""

USAGE = "python -m sweeps.optuna_search [show] search=NAME [search.trials=40 ...] [overrides of training]"


class Stop:
    """Signals to stop, remembered until a moment at which stopping is safe: an exception out of a signal handler could
    leave a lock behind, such as that of `subprocess`. A second Ctrl-C does not wait for that moment.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self) -> None:
        """From now on remember them."""
        for number in (*STOP_SIGNALS, signal.SIGINT):  # shells ignore the last one for what runs in the background
            signal.signal(number, self._remember)

    def obey(self) -> None:
        """Raise SystemExit if there was one."""
        if self.received is not None:
            sys.exit(128 + self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


class Worker:
    """One worker of a search: takes trials until all are done.

    Args:
        search: what to search.
        runs: folder of the runs; the study lies in ``search/<name>`` below it.
        stop: looked at between two steps of the work, and every ``POLL`` seconds.
    """

    def __init__(self, search: Search, runs: Path, stop: Stop) -> None:
        self.search = search
        self.runs = runs
        self.stop = stop
        self.shared = SearchStudy(search, study_folder(search, runs))
        self.study = self.shared.study

    def work(self) -> None:
        """Work on trials, and wait for those of other workers, until the study is finished."""
        waiting: list[int] = []
        while True:
            self.stop.obey()
            claimed = self.shared.claim()
            if claimed is not None:
                trial, lock = claimed
                try:
                    self.train(trial, lock)
                finally:
                    lock.release()
                waiting = []
            elif (running := self.shared.running()) != []:
                if running != waiting:
                    say(f"waiting for trials of other workers: {', '.join(map(str, running))}")
                waiting = running
                time.sleep(POLL)
            else:
                return

    def train(self, trial: Trial, lock: FileLock) -> None:
        """Train one trial and tell the study what came of it."""
        drawn = [f"{key}={text(value)}" for key, value in trial.params.items()]
        say(f"trial {trial.number}: {' '.join(drawn)}")
        overrides = [*self.search.overrides, f"name={self.search.name}", f"paths.runs={self.runs}", *drawn]
        with Training(overrides, self.shared.folder / f"trial-{trial.number}.txt", lock.fileno()) as training:
            ended = False
            while not ended:
                self.stop.obey()
                ended = training.ended(POLL)
                folder = training.folder
                if folder is None:
                    continue
                if RUN not in trial.user_attrs:
                    trial.set_user_attr(RUN, "/".join(folder.parts[-2:]))
                if (epoch := self.prunes(trial, folder)) is not None:
                    training.end()
                    (folder / PRUNED).write_text(f"{self.search.name}, trial {trial.number}, after epoch {epoch + 1}\n")
                    self.study.tell(trial, state=TrialState.PRUNED)
                    say(f"trial {trial.number}: pruned after epoch {epoch + 1}")
                    return
        if training.stopped is not None:  # the whole job is to end
            sys.exit(training.stopped)
        if training.failure is not None:
            self.fail(trial, training.failure)
        elif folder is None:
            raise ValueError(f"trial {trial.number} printed no run folder; leave hydra/job_logging as it is")
        else:
            values = {name: objective(folder, name) for name in self.search.objectives}
            if not all(math.isfinite(value) for value in values.values()):
                self.fail(trial, f"not finite: {values}")
                return
            self.study.tell(trial, list(values.values()))
            say(f"trial {trial.number}: {', '.join(f'{name} {value:.6g}' for name, value in values.items())}")

    def prunes(self, trial: Trial, folder: Path) -> int | None:
        """Report the epochs that are new, in order; the epoch after which the trial is given up, if it is.

        The newest one is judged again, for the case that a worker was killed before it acted. The last epoch of a
        training prunes nothing: nothing would be saved.
        """
        if self.search.monitor is None:
            return None
        newest = max(self.shared.stored(trial).intermediate_values, default=-1)
        for epoch, value in metric(folder, self.search.monitor).items():
            if epoch > newest:
                trial.report(value, epoch)
            if newest <= epoch < last_epoch(folder) and trial.should_prune():
                return epoch
        return None

    def fail(self, trial: Trial, reason: str) -> None:
        """Mark a trial as failed; the search goes on without it."""
        trial.set_user_attr(FAILURE, reason)
        self.study.tell(trial, state=TrialState.FAIL)
        say(f"trial {trial.number}: failed: {reason}")


def say(line: str) -> None:
    """Print a line at once, also into pipes."""
    print(line, flush=True)


def text(value: Any) -> str:
    """A drawn value as an override writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def study_folder(search: Search, runs: Path) -> Path:
    """Where the journal, the locks and the output of the trainings lie."""
    return runs / "search" / search.name


def table(study: optuna.Study, search: Search) -> str:
    """The trials as a Markdown table, and under it the best ones: more than one where objectives compete."""
    header = ["trial", "state", *search.objectives, *search.space, "run", "remark"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for trial in study.get_trials(deepcopy=False):
        values = trial.values if trial.state == TrialState.COMPLETE else [None] * len(search.objectives)
        drawn = [trial.params.get(key) for key in search.space]
        remark = f"as trial {trial.user_attrs[TWIN]}" if TWIN in trial.user_attrs else trial.user_attrs.get(FAILURE)
        row = [trial.number, trial.state.name.lower(), *values, *drawn, trial.user_attrs.get(RUN), remark]
        lines.append("| " + " | ".join(map(cell, row)) + " |")
    best = [trial.number for trial in study.best_trials if TWIN not in trial.user_attrs]
    title = "best" if len(search.objectives) == 1 else "Pareto front"
    return "\n".join([*lines, "", f"{title}: {', '.join(f'trial {number}' for number in best) or 'none yet'}"])


def cell(value: Any) -> str:
    """A value in the table."""
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def show(search: Search, runs: Path) -> None:
    """Print the study as it stands."""
    folder = study_folder(search, runs)
    if not (folder / "journal.log").is_file():
        raise ValueError(f"search.name={search.name}: no study in {folder}; start the search first")
    print(table(optuna.load_study(study_name=search.name, storage=JournalStorage(journal(folder))), search))


def arguments(words: Sequence[str]) -> tuple[Search, Path, bool]:
    """The search, the folder of the runs, and whether only to show it, from the command line."""
    shown = "show" in words
    given = [word for word in words if word != "show"]
    if any("=" not in word and not word.startswith("~") for word in given):
        raise ValueError(f"use {USAGE}")
    names = [word.partition("=")[2] for word in given if override_key(word) == "search"]
    if len(names) != 1:
        raise ValueError(f"search= is missing or given twice: use {USAGE}")
    changes = [word.removeprefix("search.") for word in given if word.startswith("search.")]
    overrides = [word for word in given if override_key(word) != "search" and not word.startswith("search.")]
    search = read_search(names[0], changes, overrides)
    runs = [word.partition("=")[2] for word in search.overrides if override_key(word) == "paths.runs"]
    return search, Path([os.environ.get("FLATBIT_RUNS") or "runs", *runs][-1]).absolute(), shown


def run(words: Sequence[str], stop: Stop | None = None) -> int:
    """Search, or show, as the command line says; the exit code: 1 where trials failed, 2 for an error of the user."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        search, runs, shown = arguments(words)
        if shown:
            show(search, runs)
            return 0
        worker = Worker(search, runs, stop or Stop())
        worker.work()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(worker.study, search))
    failed = [trial.number for trial in worker.study.get_trials(deepcopy=False) if trial.state == TrialState.FAIL]
    if failed:
        print(f"error: {len(failed)} trials failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def main() -> None:
    """Entry point."""
    stop = Stop()
    stop.listen()
    try:
        sys.exit(run(sys.argv[1:], stop))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
