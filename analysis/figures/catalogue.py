"""The page of all figures: ``python -m analysis.figures.catalogue [output=docs/figures.md]``."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from analysis.cli import script
from analysis.figures.__main__ import names
from research.runs.files import atomic_write_text

HEAD = """# Figures

Each figure is a command. It reads run folders, `runs=` one or several globs with commas between them, and writes a PDF,
a PNG and the numbers behind them as CSV into `output=` (`figures/`). Without `runs=` it shows short runs that come with
the repository (`tests/records`); `make figures` draws all of them, from these or from `RUNS='runs/*/*'`. What stands in
brackets is optional.
"""
FIRST = re.compile(r"(?P<title>.+): ``(?P<command>python -m .+)``\.")


def entry(name: str) -> str:
    """Title, command and description of a figure, from the docstring of its module."""
    first, _, rest = (import_module(f"analysis.figures.{name}").__doc__ or "").partition("\n")
    found = FIRST.fullmatch(first)
    assert found is not None and rest.strip(), f"{name}: the docstring is a title with the command, then what is shown"
    text = " ".join(rest.split()).replace("``", "`")
    return f"## {found['title']}\n\n`{found['command']}`\n\n{text}\n"


def main(output: str) -> None:
    """Write the page."""
    atomic_write_text(Path(output), "\n".join([HEAD, *map(entry, names())]))


if __name__ == "__main__":
    script(main, {"output": "docs/figures.md"})
