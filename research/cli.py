"""Command-line entry points: Hydra around a function, and every error of a user as one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from research.error_line import CONF, USER_ERRORS, error_line
from research.runs.failure import JobFailed
from research.runs.folder import FolderInUse
from research.sweep_record import SweepRecord, failed_jobs

log = logging.getLogger(__name__)


_FUNCTIONS: dict[tuple[str, str], Callable[[DictConfig], Any]] = {}
"""The functions of the commands that are imported, by module and name."""


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turn ``function(config)`` into an entry point that composes ``conf/<config_name>.yaml`` with the command line.

    Errors that a user can cause (``USER_ERRORS``) end the process with exit code 2 and one line on standard error;
    ``FLATBIT_TRACEBACK=1`` shows them whole. A multirun does all its other jobs first, then names those that failed,
    in whatever process they ran; a job whose run folder another process holds is skipped and does not count as failed.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        module, name = _importable(function.__module__), function.__name__
        _FUNCTIONS[module, name] = function

        def job(config: DictConfig) -> Any:
            return _run(module, name, config)  # launchers pickle this: the function goes by name

        job.__module__ = module  # Hydra names the job by it

        @wraps(function)
        def entry_point() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra re-raises instead of printing and exiting with 1
            SweepRecord.latest = None
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except JobFailed as failure:  # the first of a multirun, which Hydra has held until all jobs were done
                for line in failed_jobs(failure):
                    print(f"error: {line}", file=sys.stderr)
                sys.exit(2)
            except USER_ERRORS as error:  # the composition itself
                _refuse(error)

        return entry_point

    return decorate


def _importable(module: str) -> str:
    """The name by which other processes can import a module that may be running as ``__main__``."""
    spec = sys.modules[module].__spec__
    return module if spec is None else spec.name


def _run(module: str, name: str, config: DictConfig) -> Any:
    """One job of a command, in this process or, under a launcher, in one that has yet to import it."""
    if (module, name) not in _FUNCTIONS:
        import_module(module)
    function = _FUNCTIONS[module, name]
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _one_of_many(function, config)
    try:
        return function(config)
    except USER_ERRORS as error:
        _refuse(error)


def _one_of_many(function: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """A job of a multirun: its error is shown and raised as ``JobFailed``, which finds its way out of any process."""
    try:
        return function(config)
    except FolderInUse as error:
        log.warning("skipped: %s", error_line(error))
        return None
    except Exception as error:
        failure = JobFailed.by(error)
        whole = not isinstance(error, USER_ERRORS) or os.environ.get("FLATBIT_TRACEBACK") == "1"
        print(failure.traceback if whole else f"error: {failure.line}", file=sys.stderr)
        raise failure from None


def _refuse(error: BaseException) -> NoReturn:
    if os.environ.get("FLATBIT_TRACEBACK") == "1":
        raise error
    print(f"error: {error_line(error)}", file=sys.stderr)
    sys.exit(2)
