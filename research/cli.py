"""Command-line entry points: Hydra around a function, and every error of a user as one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from research.error_line import CONF, USER_ERRORS, error_line


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turn ``function(config)`` into an entry point that composes ``conf/<config_name>.yaml`` with the command line.

    Errors that a user can cause (``USER_ERRORS``) end the process with exit code 2 and one line on standard error;
    ``FLATBIT_TRACEBACK=1`` shows them whole. A multirun does its other jobs first.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @wraps(function)
        def entry_point() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra re-raises instead of printing and exiting with 1
            failed = False

            @wraps(function)
            def job(config: DictConfig) -> Any:
                nonlocal failed
                try:
                    return function(config)
                except USER_ERRORS as error:
                    failed = True
                    _report(error)
                    if HydraConfig.get().mode == RunMode.MULTIRUN:
                        raise  # for launchers with processes of their own; Hydra holds it until all jobs are done
                    return None

            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except USER_ERRORS as error:  # the composition itself, or the first failed job of a multirun
                failed = True
                _report(error)
            if failed:
                sys.exit(2)

        return entry_point

    return decorate


def _report(error: BaseException) -> None:
    if os.environ.get("FLATBIT_TRACEBACK") == "1":
        raise error
    print(f"error: {error_line(error)}", file=sys.stderr)
