"""What figures of layers share: what a run logged of every layer, lines coloured by depth, maps of widths."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.collect import Row
from analysis.figures.base import NoData, history
from analysis.labels import method_name

BITS, WEIGHT = "bits/", ".weight"
"""``bits/<layer>.weight`` is the width of a weight, as searches log it."""

Trajectories = dict[str, list[tuple[int, float]]]
"""``(optimizer steps done, value)`` by layer, in order of depth."""


def by_layer(row: Row, prefix: str, suffix: str = "") -> Trajectories:
    """The logged values of ``<prefix><layer><suffix>``; empty where the run logged none."""
    names = [name for name in row["metrics"] if name.startswith(prefix) and name.endswith(suffix)]
    return {
        name.removeprefix(prefix).removesuffix(suffix): [(step, value) for step, _, value in history(row, name)]
        for name in names
    }


def logged(rows: Sequence[Row], prefix: str, suffix: str = "") -> tuple[Row, Trajectories]:
    """The first run that logged ``<prefix><layer><suffix>``, and what it logged.

    Raises:
        NoData: no run did; ``prefix`` begins with the mechanic's name.
    """
    for row in rows:
        if found := by_layer(row, prefix, suffix):
            return row, found
    raise NoData(f"no run of callbacks=[{prefix.partition('/')[0]}] that logged {prefix}LAYER{suffix}")


def searched_widths(row: Row, layers: Collection[str]) -> Trajectories:
    """The widths of these layers' weights over training."""
    return {name: values for name, values in by_layer(row, BITS, WEIGHT).items() if name in layers}


def heading(row: Row) -> str:
    """What a run trained, for the title of a panel."""
    return f"{method_name(row)}, {row['model']}, {row['data']}"


def plot_layers(axis: Axes, found: Trajectories) -> None:
    """A line for each layer over optimizer steps, dark for the first, light for the last; their names beside them."""
    shades = matplotlib.colormaps["viridis"]
    for place, (name, values) in enumerate(found.items()):
        steps, heights = zip(*values, strict=True)
        colour = shades(0.9 * place / max(len(found) - 1, 1))
        axis.plot(steps, heights, color=colour, label=name, linewidth=1.0, marker=".", markersize=3)
    axis.set_xlabel("optimizer steps")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6, labelspacing=0.2, handlelength=1.2)


def plot_map(axis: Axes, found: Trajectories) -> None:
    """Widths over training, a line of cells for each layer."""
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
    handles = [Patch(color=grey, label=f"{bits:g} bits") for bits, grey in greys.items()]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


def name_layers(axis: Axes, layers: Sequence[str]) -> None:
    """Layers by name along the horizontal axis."""
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=7)
    axis.set_xlabel("layer, in order of depth")


def table_of(found: Trajectories, quantity: str) -> list[tuple[object, ...]]:
    """The data: ``(quantity, layer, step, value)``."""
    return [(quantity, layer, step, value) for layer, values in found.items() for step, value in values]
