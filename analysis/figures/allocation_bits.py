"""Bits of each layer over depth: ``python -m analysis.figures.allocation_bits runs=GLOB [allocations=FILE,FILE]``.

Weights above, inputs below, a bar for every allocation; equal ones share a bar. Runs that recorded their widths
(``bits/<layer>.weight``, as searches log them) get a map of layers over training each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.collect import Row
from analysis.columns import widths_from
from analysis.figures.base import COLOURS, Drawn, NoData, figure_script, history, method, panels
from analysis.rows import label
from research.quant.allocation import SLOTS, Allocation
from research.quant.recipe import FLOAT_BITS
from research.runs.allocation import ALLOCATION, read_allocation

HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo")
PREFIX, SUFFIX = "bits/", ".weight"
LEVELS = (1, 2, 4, 8, FLOAT_BITS)
HEADER = ("allocation", "step", "layer", "slot", "bits")

Trajectory = dict[str, list[tuple[int, float]]]
"""``(optimizer steps done, bits)`` of the weights, by layer."""


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
    return f"{method(row)}, widths from {widths_from(row)}" if table else method(row)


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


def trajectory(row: Row) -> Trajectory:
    """The recorded widths of a run's weights; empty where it recorded none."""
    names = [n for n in row["metrics"] if n.startswith(PREFIX) and n.endswith(SUFFIX)]
    return {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): [(step, value) for step, _, value in history(row, name)]
        for name in names
    }


def draw_bars(axis: Axes, allocations: Mapping[str, Allocation], slot: str, layers: Sequence[str]) -> None:
    """Bars of one slot on a logarithmic axis; 0 bits have none."""
    width = 0.8 / len(allocations)
    for place, (name, allocation) in enumerate(allocations.items()):
        positions = [index - 0.4 + (place + 0.5) * width for index in range(len(layers))]
        heights = [getattr(allocation[layer], slot) or 0.5 for layer in layers]
        axis.bar(
            positions, heights, width, label=name, color=COLOURS[place], hatch=HATCHES[place], edgecolor="white",
            linewidth=0,
        )  # fmt: skip
    axis.set_yscale("log", base=2)
    axis.set_ylim(0.5, 1.3 * max(max(bits) for allocation in allocations.values() for bits in allocation.values()))
    axis.yaxis.set_major_locator(FixedLocator(LEVELS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=7)
    axis.set_xlabel("layer, in order of depth")
    axis.set_ylabel(f"bits of the {slot}")


def draw_map(axis: Axes, found: Trajectory, title: str) -> list[Patch]:
    """Widths over training, a line of cells for each layer; the legend's handles."""
    steps = sorted({step for values in found.values() for step, _ in values})
    widths = sorted({bits for values in found.values() for _, bits in values})
    greys = {bits: str(0.9 - 0.8 * index / max(len(widths) - 1, 1)) for index, bits in enumerate(widths)}
    end = steps[-1] + (steps[-1] - steps[0]) / max(len(steps) - 1, 1)
    for line, values in enumerate(found.values()):
        bounds = [step for step, _ in values] + [end]
        for (start, bits), stop in zip(values, bounds[1:], strict=True):
            axis.barh(line, stop - start, 1.0, left=start, color=greys[bits])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_yticks(range(len(found)), list(found), fontsize=min(7.0, 100 / len(found)))
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("layer")
    axis.set_title(title)
    return [Patch(color=grey, label=f"{bits:g} bits") for bits, grey in greys.items()]


def draw(rows: Sequence[Row], allocations: str | Sequence[str] = ()) -> Drawn:
    """Bars of all allocations of one network, and maps of the runs that recorded theirs.

    Args:
        rows: of runs.
        allocations: further files of ``analysis.allocate``; they choose the network.
    """
    files = [allocations] if isinstance(allocations, str) else list(allocations)
    files = [file for entry in files for file in entry.split(",")]
    found, network = gathered(rows, files)
    if len(found) > len(COLOURS):
        raise ValueError(f"runs= hold {len(found)} allocations ({', '.join(found)}): use {len(COLOURS)} at most")
    layers = list(next(iter(found.values())))
    recorded = {label(row): trajectory(row) for row in rows if trajectory(row)}
    figure, axes = panels(2 + len(recorded), 1, width=max(4.5, 0.32 * len(layers)), height=2.9)
    table: list[tuple[Any, ...]] = []
    for axis, slot in zip(axes, SLOTS, strict=False):
        draw_bars(axis, found, slot, layers)
        table += [(name, "", layer, slot, getattr(a[layer], slot)) for name, a in found.items() for layer in layers]
    axes[0].set_title(f"{network}: bits of each layer")
    if len(found) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    for axis, (name, values) in zip(axes[2:], recorded.items(), strict=True):
        shades = draw_map(axis, values, name)
        axis.legend(handles=shades, loc="center left", bbox_to_anchor=(1.0, 0.5))
        table += [(name, step, layer, "weight", bits) for layer, line in values.items() for step, bits in line]
    return Drawn(figure, HEADER, table)


if __name__ == "__main__":
    figure_script(draw, __file__)
