"""Errors that a user can cause, as one line that names the config key and what would be right."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

CONF = Path(__file__).resolve().parent.parent / "conf"
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, MisconfigurationException)
"""What a user can cause; anything else is a mistake of this house and keeps its traceback."""


def error_line(error: BaseException) -> str:
    """The message of one of ``USER_ERRORS`` on one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}; write key=value, lists in quotes: 'callbacks=[sam]'"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        mechanic = re.match(r"Could not override 'callbacks\.(\w+)", str(error))
        if mechanic and cause.full_key in ("callbacks", f"callbacks.{mechanic[1]}"):
            return f"callbacks.{mechanic[1]} is not chosen; choose it with 'callbacks=[{mechanic[1]}]'"
        known = ", ".join(str(key) for key in cause.parent_node or () if key != "hydra")
        if not known:
            return f"{cause.full_key} is unknown, and nothing is set there; write +{cause.full_key}=VALUE to add it"
        return f"{cause.full_key} is unknown; use one of {known}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; add {error.full_key}=VALUE"
    merging = re.match(r"Error merging override \+*([^=\s]+)=(.*)", str(error))
    if merging and isinstance(cause, ConfigTypeError):
        key, value = merging.groups()
        return f"{key} is of another kind (mapping, list or value) than {value}; write '~{key}' '+{key}={value}'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(kept) or type(error).__name__


def _unknown_option(path: str) -> str:
    """``callbacks/name`` in the words of the command line, with the options that there are."""
    group, _, name = path.removesuffix(".yaml").rpartition("/")
    if not group:
        return f"-cn {name}: there is no such config; use one of a folder given by -cd, such as -cd sweeps -cn saq_rho"
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if not options:
        return f"{group}={name}: there is no group {group}"
    return f"{group}={name} is unknown; use one of {', '.join(options)}"
