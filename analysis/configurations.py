"""Configurations of many runs, read fast: the runs of a sweep share nearly all of their top-level blocks.

PyYAML takes 9 ms for one configuration, with libyaml 2.5 ms; a block that another run had too takes the time of a copy.
"""

from __future__ import annotations

import re
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
