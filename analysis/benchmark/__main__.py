"""``python -m analysis.benchmark SUBCOMMAND [key=value ...]``: one of `MEASURES`, or ``page``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from analysis.benchmark import compile, curvature, data, inference, lightning, memory, page, peers, train
from analysis.cli import script
from research.results import hardware
from research.runs.environment import snapshot
from research.runs.files import atomic_write_text
from research.runs.records import write_json

RECORDS = "docs/results/performance"

STEP: dict[str, Any] = {"rounds": 15, "batch_size": 128, "model": "resnet20", "device": "cpu", "clock": "wall"}

MEASURES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "train": (train.measure, {**STEP, "only": None}),
    "peers": (peers.measure, {**STEP, "bits": 4, "folder": None, "only": None}),
    "memory": (memory.measure, {"batch_size": 128, "model": "resnet20", "device": "cpu"}),
    "compile": (compile.measure, {"batch_size": 128, "model": "resnet20"}),
    "data": (data.measure, {"rounds": 5, "batch_size": 128, "images": 50_000, "device": "cpu"}),
    "lightning": (lightning.measure, {"rounds": 5, "batches": 500, "clock": "wall"}),
    "curvature": (curvature.measure, {**STEP, "rounds": 5, "images": 512}),
    "inference": (inference.measure, {"rounds": 30, "model": "resnet20", "batches": [1, 64]}),
}
"""Subcommand to what measures it, with its settings."""


def folder_of(machine: str) -> str:
    """A folder's name for a machine in words: ``AMD EPYC, 2 cores`` -> ``amd_epyc_2_cores``."""
    return re.sub(r"[^a-z0-9]+", "_", machine.lower().replace("(r)", "")).strip("_")


def benchmark(kind: str, output: str, threads: int, **settings: Any) -> None:
    """Measure, print, and keep the record.

    Args:
        kind: subcommand.
        output: folder of the records, with one for each machine inside.
        threads: of torch.
        settings: of the measurement.
    """
    torch.set_num_threads(threads)
    values = MEASURES[kind][0](**settings)
    device = settings.get("device", "cpu")
    machine = hardware(snapshot(), device)
    record = {
        "hardware": f"{machine}, {threads} threads",
        "torch": torch.__version__,
        "settings": settings,
        "values": values,
    }
    write_json(Path(output) / folder_of(machine) / f"{kind}.json", record)
    print(page.SECTIONS[kind][1](record))


def write_page(records: str, output: str) -> None:
    """Make the page of the kept records."""
    atomic_write_text(Path(output), page.page(Path(records)))


def main() -> None:
    """Entry point: the first argument says what is measured."""
    kind = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if kind == "page":
        script(write_page, {"records": RECORDS, "output": "docs/results/performance.md"})
    elif kind in MEASURES:
        defaults: Mapping[str, Any] = {"output": RECORDS, "threads": os.cpu_count(), **MEASURES[kind][1]}

        def run(**arguments: Any) -> None:
            benchmark(kind, **arguments)

        script(run, defaults)
    else:
        print(f"error: {kind or 'nothing'} to measure: use one of {', '.join([*MEASURES, 'page'])}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
