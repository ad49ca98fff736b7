"""All figures in one process: ``python -m analysis.figures [runs=GLOB] [output=figures] [only=SLUG]``.

One line for each; those for which the runs hold no data are named. With ``only``, the figures whose name begins so.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

from analysis.cli import script
from analysis.figures.base import RECORDS, Draw, NoData, find, save


def names() -> list[str]:
    """All figures: the modules beside this one but for what they share."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "_" in p.stem.strip("_"))


def drawer(name: str) -> Draw:
    """The function that draws a figure."""
    found: Draw = import_module(f"analysis.figures.{name}").draw
    return found


def main(runs: str, output: str, only: str) -> None:
    """Draw the figures; exit 1 if one failed.

    Args:
        runs: globs over run folders, or folders of such, separated by commas.
        output: folder for the files of each figure.
        only: beginning of the names of those to draw.
    """
    rows = find(runs)
    chosen = [name for name in names() if name.startswith(only)]
    if not chosen:
        raise ValueError(f"only={only}: no figure begins so; use one of {', '.join(names())}")
    failed, empty = [], []
    for name in chosen:
        started = time.monotonic()
        try:
            pdf, *_ = save(drawer(name)(rows), Path(output), name)
            print(f"{name:<36} {pdf} ({time.monotonic() - started:.1f} s)", flush=True)
        except NoData as error:
            empty.append(name)
            print(f"{name:<36} no data: {error}", flush=True)
        except ValueError as error:
            failed.append(name)
            print(f"{name:<36} error: {error}", flush=True)
    if empty:
        print(f"no data for {', '.join(empty)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    script(main, {"runs": RECORDS, "output": "figures", "only": ""})
