"""Bits of each layer over depth: ``python -m analysis.figures.allocation_bits runs=GLOB [allocations=FILE,FILE]``.

Weights above, inputs below, a line of numbers for every allocation; equal ones share a line. Runs that recorded their
widths (``bits/<layer>.weight``, as searches log them) get a map of layers over training each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from analysis.collect import Row
from analysis.columns import widths_from
from analysis.figures.base import Drawn, NoData, figure_script, panels
from analysis.figures.layers import BITS, WEIGHT, by_layer, name_layers, plot_map
from analysis.labels import method_name
from analysis.rows import label
from research.quant.allocation import SLOTS, Allocation
from research.quant.recipe import FLOAT_BITS
from research.runs.allocation import ALLOCATION, read_allocation

HEADER = ("allocation", "step", "layer", "slot", "bits")


def allocation_of(row: Row) -> Allocation | None:
    """The widths that a run searched for, else those it was trained at; None where it has no quantizers or no table."""
    if row["path"] is None:
        return None
    searched, table = row["path"] / ALLOCATION, row["path"] / "table.yaml"
    path = searched if searched.is_file() else table
    if not path.is_file():
        return None
    found = read_allocation(path)
    return found if any(bits.weight != FLOAT_BITS for bits in found.values()) else None


def name_of(allocation: Allocation) -> str:
    """``W4A4`` where all layers but the first and the last are alike, else their mean widths, ``W2.8A4 mixed``."""
    inner = list(allocation.values())[1:-1] or list(allocation.values())
    if len(set(inner)) == 1:
        return str(inner[0])
    weight, inputs = (sum(bits[slot] for bits in inner) / len(inner) for slot in range(2))
    return f"W{weight:.3g}A{inputs:.3g} mixed"


def chosen_by(row: Row) -> str:
    """The run's method, with what chose its widths where these came as a table."""
    table = row["config"]["quantizer"].get("table")
    return f"{method_name(row)}, widths from {widths_from(row)}" if table else method_name(row)


def gathered(rows: Sequence[Row], files: Sequence[str]) -> tuple[dict[str, Allocation], str]:
    """Different allocations of one network by name, and the name of the network: the one with most of them.

    Raises:
        NoData: no run has a quantizer, and there is no file.
    """
    found: dict[str, dict[Allocation, str]] = {}
    networks: dict[tuple[str, ...], str] = {}
    for row in rows:
        allocation = allocation_of(row)
        if allocation is not None:
            networks.setdefault(tuple(allocation), row["model"])
            called = name_of(allocation)
            if "mixed" in called:
                called = f"{chosen_by(row)}, {called}"
            found.setdefault(networks[tuple(allocation)], {}).setdefault(allocation, called)
    given = {read_allocation(Path(file)): Path(file).stem for file in files}
    if given:
        network = networks.get(tuple(next(iter(given))), "network")
        chosen = {**given, **{a: n for a, n in found.get(network, {}).items() if a not in given}}
    elif found:
        network = max(found, key=lambda model: len(found[model]))
        chosen = dict(sorted(found[network].items(), key=lambda entry: sum(bits.weight for bits in entry[0].values())))
    else:
        raise NoData("no run with quantizers and a table.yaml")
    return {f"{called} ({number})" if list(chosen.values()).count(called) > 1 else called: allocation
            for number, (allocation, called) in enumerate(chosen.items(), 1)}, network  # fmt: skip


def draw_numbers(axis: Axes, allocations: Mapping[str, Allocation], slot: str, layers: Sequence[str]) -> None:
    """The widths of one slot, a line for each allocation, a column for each layer, the darker the wider."""
    widths = [[getattr(allocation[layer], slot) for layer in layers] for allocation in allocations.values()]
    shades = [[min(bits, 8) / 8 for bits in line] for line in widths]
    axis.imshow(shades, cmap="Greys", vmin=0, vmax=1.4, aspect="auto", interpolation="none")
    for row, line in enumerate(widths):
        for column, bits in enumerate(line):
            dark = shades[row][column] > 0.7
            axis.text(column, row, str(bits), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_yticks(range(len(allocations)), list(allocations), fontsize=7)
    axis.set_ylabel(f"bits of the {slot}")
    name_layers(axis, layers)


def draw(rows: Sequence[Row], allocations: str | Sequence[str] = ()) -> Drawn:
    """All allocations of one network in numbers, and maps of the runs that recorded theirs.

    Args:
        rows: of runs.
        allocations: further files of ``analysis.allocate``; they choose the network.
    """
    files = [allocations] if isinstance(allocations, str) else list(allocations)
    files = [file for entry in files for file in entry.split(",")]
    found, network = gathered(rows, files)
    layers = list(next(iter(found.values())))
    recorded = [(row, widths) for row in rows if (widths := by_layer(row, BITS, WEIGHT))]
    height = max(2.9, 1.3 + 0.2 * len(found))
    figure, axes = panels(2 + len(recorded), 1, width=max(4.5, 0.32 * len(layers)), height=height)
    table: list[tuple[Any, ...]] = []
    for axis, slot in zip(axes, SLOTS, strict=False):
        draw_numbers(axis, found, slot, layers)
        table += [(name, "", layer, slot, getattr(a[layer], slot)) for name, a in found.items() for layer in layers]
    axes[0].set_title(f"{network}: bits of each layer")
    for axis, (row, values) in zip(axes[2:], recorded, strict=True):
        plot_map(axis, values)
        axis.set_title(f"{method_name(row)}, {label(row)}")
        table += [(label(row), step, layer, "weight", bits) for layer, line in values.items() for step, bits in line]
    return Drawn(figure, HEADER, table)


if __name__ == "__main__":
    figure_script(draw, __file__)
