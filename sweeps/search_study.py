"""The study of a search on disk: a journal that many workers share, and which trial each of them works on.

A worker holds the file lock of its trial, and so does the training that it starts. The kernel lets go of a lock
however its holders end, so a running trial whose lock is free has lost its worker: the next one takes it up again,
with the parameters that were drawn, and its run folder goes on where it stopped.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps.search_definition import Search

IDENTITY = "identity"
"""Study attribute: what all workers agree on."""

RUN, TWIN, FAILURE = "run", "twin", "failure"
"""Trial attributes: its run as `<experiment>/<hash>`, the trial that it repeats, the last line of a failed training."""


class FileLock:
    """An exclusive lock on a file, held by this process and by those that inherit its descriptor.

    It also locks the journal, in place of Optuna's own locks: after a kill those block all workers for 30 seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; False where another process has it and `wait` is not set."""
        file = self.path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Let go of it; processes that inherited it keep it until they end."""
        assert self._file is not None
        self._file.close()

    def fileno(self) -> int:
        """The descriptor to inherit."""
        assert self._file is not None
        return self._file.fileno()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock and hold it."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


class SearchStudy:
    """The study below `folder`, made by the first worker.

    Raises:
        ValueError: the folder holds a study of another search.
    """

    def __init__(self, search: Search, folder: Path) -> None:
        self.search = search
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._claims = FileLock(folder / "claims.lock")
        self.storage = JournalStorage(journal(folder))
        with self._claims.held():
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=search.name,
                directions=search.directions,
                pruner=search.make_pruner(),
                load_if_exists=True,
            )
            made_with = self.study.user_attrs.get(IDENTITY)
            if made_with is None:
                self.study.set_user_attr(IDENTITY, search.identity())
                return
            changed = [f"search.{key}" for key, value in search.identity().items() if made_with[key] != value]
            if changed:
                raise ValueError(
                    f"search.name={search.name}: the study in {folder} was started with another "
                    f"{', '.join(changed)}; use another search.name"
                )

    def claim(self) -> tuple[Trial, FileLock] | None:
        """A trial for this worker, with its lock: one that lost its worker, else a new one; None where there is none.

        A trial with the parameters of an earlier one is never trained: it gets the other's values, at once or when
        that is done.
        """
        with self._claims.held():
            while True:
                trials = self.study.get_trials(deepcopy=False)
                for frozen in trials:
                    if frozen.state == TrialState.RUNNING and (claimed := self._take(frozen)):
                        return claimed
                if len(trials) >= self.search.trials:
                    return None
                self.study.ask()  # running, without a lock and without parameters: taken up next

    def running(self) -> list[int]:
        """Numbers of the trials that are not done."""
        return [t.number for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]

    def stored(self, trial: Trial) -> FrozenTrial:
        """A trial as it stands in the journal."""
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _take(self, frozen: FrozenTrial) -> tuple[Trial, FileLock] | None:
        lock = FileLock(self.folder / f"trial-{frozen.number}.lock")
        if not lock.acquire(wait=False):
            return None
        self.study.sampler = self.search.sampler_of(frozen.number)
        trial = Trial(self.study, frozen._trial_id)  # Optuna has no public way to a trial that runs already
        if self.stored(trial).state == TrialState.RUNNING:  # not done since it was listed
            self._draw(trial)
            twin = self._twin(trial)
            if twin is None:
                return trial, lock
            self._settle(trial, twin)
        lock.release()
        return None

    def _draw(self, trial: Trial) -> None:
        """Give the trial its parameters; those that it has already, it keeps."""
        for key, kind in self.search.distributions().items():
            match kind:
                case FloatDistribution():
                    trial.suggest_float(key, kind.low, kind.high, step=kind.step, log=kind.log)
                case IntDistribution():
                    trial.suggest_int(key, kind.low, kind.high, step=kind.step, log=kind.log)
                case CategoricalDistribution():
                    trial.suggest_categorical(key, kind.choices)

    def _twin(self, trial: Trial) -> FrozenTrial | None:
        """The first earlier trial with the same parameters that did not fail."""
        earlier = self.study.get_trials(deepcopy=False)[: trial.number]
        return next((t for t in earlier if t.params == trial.params and t.state != TrialState.FAIL), None)

    def _settle(self, trial: Trial, twin: FrozenTrial) -> None:
        """Give the trial what its twin has come to, if it has."""
        if twin.state == TrialState.RUNNING:
            return
        trial.set_user_attr(TWIN, twin.number)
        trial.set_user_attr(RUN, twin.user_attrs[RUN])
        if twin.state == TrialState.COMPLETE:
            self.study.tell(trial, twin.values)
        else:
            self.study.tell(trial, state=twin.state)


def journal(folder: Path) -> JournalFileBackend:
    """The journal of the study below `folder`."""
    lock = FileLock(folder / "journal.lock")  # all that Optuna asks of a lock is acquire and release
    return JournalFileBackend(str(folder / "journal.log"), lock)  # type: ignore[arg-type]
