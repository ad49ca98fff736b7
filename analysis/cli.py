"""Arguments of the analysis scripts: ``key=value``, checked against the script's own defaults."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from research.arguments import check_arguments

REQUIRED = "???"


def script(main: Callable[..., None], defaults: Mapping[str, Any]) -> None:
    """Call ``main(**arguments)`` with ``defaults`` overridden by the command line; a user's error is one line, exit 2.

    Args:
        main: the script's function.
        defaults: every argument with its default, ``???`` for required ones.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(main, defaults))
        return
    try:
        given = OmegaConf.to_container(OmegaConf.from_cli(sys.argv[1:]))
        assert isinstance(given, dict)
        unknown = [key for key in given if key not in defaults]
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown: use {', '.join(f'{key}=...' for key in defaults)}")
        arguments = {**defaults, **given}
        missing = [key for key, value in arguments.items() if value == REQUIRED]
        if missing:
            raise ValueError(f"{missing[0]}= is missing: give {', '.join(f'{key}=...' for key in missing)}")
        check_arguments(main, arguments, key="")
        main(**arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, OmegaConfBaseException, YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def usage(main: Callable[..., None], defaults: Mapping[str, Any]) -> str:
    """What a script is for, what its arguments mean, and their defaults."""
    texts = [inspect.getdoc(sys.modules[main.__module__]), inspect.getdoc(main)]
    values = " ".join(f"{key}={'null' if value is None else value}" for key, value in defaults.items())
    return "\n\n".join([*(text for text in texts if text), f"Defaults: {values}"])
