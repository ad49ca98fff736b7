"""Configurations of many runs, read fast and completed.

The runs of a sweep share nearly all of their top-level blocks. PyYAML takes 9 ms for one configuration, with libyaml
2.5 ms; a block that another run had too takes the time of a copy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it
BLOCK = re.compile(r"^(?=[^\s#-])", flags=re.MULTILINE)
"""Where a top-level key starts: nothing else in a block mapping stands in the first column but comments and lists."""


def read_yaml(path: Path) -> Any:
    """The plain containers in a YAML file, as ``yaml.safe_load`` reads them.

    Raises:
        ValueError: the file is not YAML.
    """
    text = path.read_text()
    try:
        blocks = [_parsed(block) for block in BLOCK.split(text) if block]
        if all(isinstance(block, dict) and len(block) == 1 for block in blocks):
            return {key: deepcopy(value) for block in blocks for key, value in block.items()}
    except yaml.YAMLError:
        pass  # anchors of another block, brackets that close in the first column: the whole file tells
    try:
        return yaml.load(text, Loader=LOADER)  # noqa: S506  (a safe loader either way)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=4096)
def _parsed(block: str) -> Any:
    return yaml.load(block, Loader=LOADER)  # noqa: S506


def complete(configs: Sequence[dict[str, Any]]) -> None:
    """Give each object the options that it has in other configurations only, at the defaults of its class.

    A run lacks an option that its object (``_target_``) did not have yet when it ran, and its network is built again
    with the default; so it is the same configuration as a later run's that has the default. An object whose class
    cannot be found stays as it is.

    Args:
        configs: of runs; changed in place.
    """
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for config in configs:
        for key, options in _objects(config):
            alike.setdefault((key, options["_target_"]), []).append(options)
    for (_, target), found in alike.items():
        names = list(dict.fromkeys(name for options in sorted(found, key=len, reverse=True) for name in options))
        lacking = [options for options in found if len(options) < len(names)]
        defaults = _defaults(target) if lacking else {}
        for options in lacking:
            known = {**{name: defaults[name] for name in names if name in defaults}, **options}
            options.clear()
            options.update({name: known[name] for name in names if name in known})


def _objects(tree: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield key, tree
        for name, value in tree.items():
            yield from _objects(value, f"{key}.{name}")


def _defaults(target: str) -> dict[str, Any]:
    """Plain defaults of a class or function by name; none where it cannot be found or may not be named by a run."""
    from research.targets import find_target  # imports torch, which few tables need

    try:
        parameters = inspect.signature(find_target(target)).parameters
    except ValueError:
        return {}
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is None or isinstance(parameter.default, bool | int | float | str)
    }
