"""Result tables from run folders: ``python -m analysis.tables runs=GLOB [output=FILE] [columns=KEY,KEY]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from research.runs.files import atomic_write_text

HEADER = (
    "experiment", "method", "bits", "seeds", "epochs", "val %", "float %", "quantized %", "deployed %", "size KiB",
    "compression", "GBOPs", "hardware", "minutes",
)  # fmt: skip


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same experiment, deployment and configuration but for the seed, seeds in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        config = {key: value for key, value in row["config"].items() if key not in ("seed", "logger")}
        config["data"] = {key: value for key, value in config["data"].items() if key != "seed"}
        groups.setdefault(f"{row['name']} {config}", []).append(row)
    return [sorted(group, key=lambda row: row["seed"]) for group in groups.values()]


def spread(values: Sequence[float | None], digits: int = 2, factor: float = 1.0) -> str:
    """``mean`` or ``mean ± standard deviation`` over seeds; a dash where there is nothing."""
    known = [factor * value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def further(rows: Sequence[Row], column: str) -> str:
    """One more cell for a group of runs: ``changes``, ``ptq_<bits>`` in percent, or the value at a config key."""
    if column == "changes":
        return f"`{rows[0]['changes']}`" if rows[0]["changes"] else "–"
    if column.startswith("ptq_"):
        return spread([row.get(column) for row in rows], factor=100)
    value: Any = rows[0]["config"]
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "–" if value is None else str(value)


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """The table's cells for one group of runs."""
    first = rows[0]
    quantizer: dict[str, Any] = first["config"]["quantizer"]
    weight, inputs = quantizer.get("weight") or {}, quantizer.get("input") or {}
    method = "+".join([weight.get("name", "float"), *first["mechanics"]])
    bits = "table" if quantizer.get("table") else f"{weight.get('bits', 32)}/{inputs.get('bits', 32)}"
    name = first["experiment"] + ("" if first["name"] == "final" else f" ({first['name']})")
    return (
        name,
        method,
        bits,
        ", ".join(str(row["seed"]) for row in rows),
        str(first["epochs"]),
        spread([row["val_accuracy"] for row in rows], factor=100),
        spread([row["float_accuracy"] for row in rows], factor=100),
        spread([row["accuracy"] for row in rows], factor=100),
        spread([row.get("deployed_accuracy") for row in rows], factor=100),
        f"{first['size_kib']:.1f}",
        f"{first['compression']:.2f}",
        f"{first['bops'] / 1e9:.3f}",
        first["hardware"],
        spread([row["seconds"] / 60 for row in rows], digits=1),
    )


def markdown(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """A Markdown table, a line per group of runs; for ``columns`` see `further`."""
    lines = ["| " + " | ".join([*HEADER, *columns]) + " |", "|" + " --- |" * (len(HEADER) + len(columns))]
    for group in grouped(rows):
        lines.append("| " + " | ".join([*cells(group), *(further(group, column) for column in columns)]) + " |")
    return "\n".join(lines)


def main(runs: str, output: str | None, title: str, preface: str | None, columns: str | None) -> None:
    """Print the table, or write it as a page that says where it comes from.

    Args:
        runs: glob over run folders.
        output: Markdown file to write; None prints.
        title: heading of the page.
        preface: Markdown file whose text goes between heading and table.
        columns: further columns, separated by commas: config keys such as ``optimizer.lr``, ``changes`` (the overrides
            of the experiment), ``ptq_<bits>`` and ``ptq_mse_<bits>`` (accuracy after post-training quantization).
    """
    table = markdown(collect(runs), columns.split(",") if columns else ())
    if output is None:
        print(table)
        return
    text = "" if preface is None else Path(preface).read_text().strip() + "\n\n"
    command = f"python -m analysis.tables 'runs={runs}'" + (f" columns={columns}" if columns else "")
    page = f"# {title}\n\n{text}{table}\n\nGenerated from run folders: `{command}`.\n"
    atomic_write_text(Path(output), page)


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "output": None, "title": "Results", "preface": None, "columns": None})
