"""Arguments of the analysis scripts: ``key=value``, checked against the script's own defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

REQUIRED = "???"


def script(main: Callable[..., None], defaults: Mapping[str, Any]) -> None:
    """Call ``main(**arguments)`` with ``defaults`` overridden by the command line; a user's error is one line, exit 2.

    Args:
        main: the script's function.
        defaults: every argument with its default, ``???`` for required ones.
    """
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
        main(**arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
