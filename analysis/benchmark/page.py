"""The performance page, made from the records of `python -m analysis.benchmark`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
CIFAR10_IMAGES = 50_000


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _train(record: Record) -> str:
    steps = CIFAR10_IMAGES / record["settings"]["batch_size"]
    rows = [
        (
            group,
            name,
            f"{cell['ms']:.0f}",
            f"{cell['ratio']:.2f}",
            f"{cell['low']:.2f} to {cell['high']:.2f}",
            f"{cell['ms'] * steps / 1e3:.0f}",
        )
        for group, ways in record["values"].items()
        for name, cell in ways.items()
    ]
    header = ("mode", "network", "ms a step", "ratio to float in the same mode", "quartiles")
    return (
        "The detach form, of torch's own operations, is what a step was before the fused functions; the experiments on "
        "CIFAR-10 run compiled.\n\n" + _table((*header, "seconds an epoch of CIFAR-10's 50,000 images"), rows)
    )


def _memory(record: Record) -> str:
    values = record["values"]
    rows = [
        (name, f"{cell['saved_mib']:.0f}", f"{cell['ratio']:.2f}", f"{cell['peak_mib']:.0f}")
        for name, cell in values.items()
    ]
    return _table(("network", "kept for backward, MiB", "ratio to float, eager", "peak of a process, MiB"), rows)


def _compile(record: Record) -> str:
    values = record["values"]
    rows = [(name, f"{cell['cold_s']:.0f}", f"{cell['warm_s']:.0f}") for name, cell in values.items()]
    return _table(("network", "seconds to the first step, empty cache", "with the cache of an earlier process"), rows)


def _data(record: Record) -> str:
    values = record["values"]
    rows = [(name, f"{cell['images_per_second']:,.0f}", f"{cell['ratio']:.1f}") for name, cell in values.items()]
    return _table(("loader", "images a second", "ratio"), rows)


def _lightning(record: Record) -> str:
    values = record["values"]
    rows = [(name, f"{cell['us']:.0f}", f"{cell['above_us']:.0f}") for name, cell in values.items()]
    return _table(("loop", "µs a step", "µs above the loop by hand"), rows)


def _peers(record: Record) -> str:
    values = record["values"]
    rows = [
        (
            f"{peer} {found['version']}" if name == peer else name,
            found["form"] if name == peer else "",
            f"{cell['ms']:.0f}",
            f"{cell['ratio']:.2f}",
            f"{cell['low']:.2f} to {cell['high']:.2f}",
            f"{cell['saved_mib']:.0f}",
            f"{cell['saved_ratio']:.2f}",
        )
        for peer, found in values["measured"].items()
        for name, cell in found["networks"].items()
    ]
    header = ("network", "form", "ms a step", "ratio to float", "quartiles", "kept for backward, MiB", "ratio to float")
    parts = [_table(header, rows)] if rows else []
    parts += [f"{peer} was not measured: {reason}." for peer, reason in values["skipped"].items()]
    return (
        "Eager and channels-last; each peer in a process of its own with the float network and our quantizers, in "
        "turn.\n\n" + "\n\n".join(parts)
    )


def _curvature(record: Record) -> str:
    values = record["values"]
    rows = [
        (network, way, f"{cell['ms'] / 1e3:.2f}", f"{cell['ratio']:.2f}", f"{cell['low']:.2f} to {cell['high']:.2f}")
        for network, ways in values.items()
        for way, cell in ways.items()
    ]
    header = ("network", "Hessian-vector product", "seconds", "ratio to the double backward by hand", "quartiles")
    return f"With kept graphs: every product but the first.\n\n{_table(header, rows)}"


def _inference(record: Record) -> str:
    values = record["values"]
    rows, skipped = [], []
    for engine, found in values.items():
        if "skipped" in found:
            skipped.append(f"{engine}: {found['skipped']}")
            continue
        rows += [
            (
                f"{engine} ({found['version']})",
                batch,
                name,
                f"{cell['images_per_second']:,.0f}",
                f"{cell['speedup']:.2f}",
                f"{cell['low']:.2f} to {cell['high']:.2f}",
                f"{cell['max_abs_diff']:.2g}",
                f"{100 * cell['argmax_agreement']:.1f} %",
            )
            for batch, networks in found["batches"].items()
            for name, cell in networks.items()
        ]
    header = ("engine", "batch", "network", "images a second", "times float", "quartiles")
    header += ("largest difference from PyTorch", "equal predictions")
    return "\n\n".join([_table(header, rows), *(f"Skipped: {reason}." for reason in skipped)])


SECTIONS = {
    "train": ("Training step", _train),
    "peers": ("Training step of other libraries", _peers),
    "memory": ("Memory", _memory),
    "compile": ("Start of a run", _compile),
    "data": ("Data path", _data),
    "lightning": ("Everything but the network", _lightning),
    "curvature": ("Curvature", _curvature),
    "inference": ("Deployed inference", _inference),
}
"""Subcommand to heading and table."""


def page(folder: Path) -> str:
    """The page of all records in a folder (``<machine>/<subcommand>.json``).

    Raises:
        ValueError: no record there.
    """
    parts = [
        "# Performance\n\nRatios of medians measured in turn in one process, on each machine by itself. The machines "
        "were shared: quartiles of the single rounds say how far to trust a ratio.\n"
    ]
    for kind, (heading, table) in SECTIONS.items():
        records = sorted(folder.glob(f"*/{kind}.json"))
        parts += [f"## {heading}\n"] if records else []
        for path in records:
            record: Record = json.loads(path.read_text())
            settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items() if value is not None)
            parts.append(f"{table(record)}\n\n{record['hardware']}, torch {record['torch']}; {settings}.\n")
    if len(parts) == 1:
        raise ValueError(f"records={folder}: no record there; make some, e.g. python -m analysis.benchmark train")
    return "\n".join(parts) + "\nGenerated: `python -m analysis.benchmark page`.\n"
