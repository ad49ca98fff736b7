"""Command-line entry points: Hydra around a function, and every error of a user as one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parent.parent / "conf"
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turn ``function(config)`` into an entry point that composes ``conf/<config_name>.yaml`` with the command line.

    Errors that a user can cause (``USER_ERRORS``) end the process with exit code 2 and one line on standard error;
    ``FLATBIT_TRACEBACK=1`` shows them whole.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[str] = []

        @wraps(function)
        def job(config: DictConfig) -> Any:
            try:
                return function(config)
            except USER_ERRORS as error:
                failures.append(_report(error))
                return None  # the other jobs of a multirun go on

        run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)

        def entry_point() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra re-raises instead of printing and exiting with 1
            try:
                run()
            except USER_ERRORS as error:  # the composition itself
                failures.append(_report(error))
            if failures:
                sys.exit(2)

        return entry_point

    return decorate


def _report(error: BaseException) -> str:
    if os.environ.get("FLATBIT_TRACEBACK") == "1":
        raise error
    message = f"error: {one_line(error)}"
    print(message, file=sys.stderr)
    return message


def one_line(error: BaseException) -> str:
    """The message of an error, without the line breaks and the object dump of the libraries underneath."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(kept) or type(error).__name__
