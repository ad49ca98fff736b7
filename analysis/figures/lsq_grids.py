"""Weights and inputs over their grids: ``python -m analysis.figures.lsq_grids runs=GLOB [layer=NAME]``.

For a run of LSQ at each width: histogram of one layer's latent weights and of its inputs on test images, in units of
the layer's scale, with the share of values at each level of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.collect import Row
from analysis.columns import widths
from analysis.distributions import density, distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels
from analysis.labels import method_name
from analysis.rows import label

SLOTS = ("weight", "input")
INNER = "layer2.0.conv2"


def chosen(rows: Sequence[Row], layer: str) -> list[tuple[Row, dict[str, Any]]]:
    """The first LSQ run of each width with this layer's distributions, widest first.

    Raises:
        NoData: no such run.
        ValueError: no such layer, or one without quantizers of at most 4 bits.
    """
    found: dict[tuple[int, int], tuple[Row, dict[str, Any]]] = {}
    for row in rows:
        bits = widths(row)
        if method_name(row) != "LSQ" or bits is None or bits in found:
            continue
        layers = distributions(row)
        if layers is None:
            continue
        inner = [name for name, slots in layers.items() if all("codes" in slots[slot] for slot in SLOTS)]
        if layer not in inner:
            raise ValueError(f"layer={layer}: no layer of {label(row)} with codes kept; use one of {', '.join(inner)}")
        found[bits] = (row, layers[layer])
    if not found:
        raise NoData("no run of LSQ with distributions")
    return [found[bits] for bits in sorted(found, reverse=True)]


def draw_slot(axis: Axes, data: dict[str, Any]) -> None:
    """Histogram, levels and shares of one tensor, in units of its scale."""
    codes, levels = np.array(data["codes"]), np.array(data["levels"])
    scale = (levels[-1] - levels[0]) / (codes[-1] - codes[0])  # in units of the root mean square
    edges, dense = (np.array(values) for values in density(data["histogram"], merge=2))
    axis.stairs(dense * scale, edges / scale, fill=True, color="0.75", label="before quantization (density)")
    axis.vlines(codes, 0, 2, color="0.2", lw=0.6, ls="--", label="levels")
    axis.plot(codes, data["share"], "ok", markersize=3.5, label="share of each level")
    axis.set_xlim(codes[0] - 1.5, codes[-1] + 1.5)
    axis.set_ylim(0, 1.15 * max(*data["share"], float(np.quantile(dense * scale, 0.97))))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw(rows: Sequence[Row], layer: str = INNER) -> Drawn:
    """One column per width.

    Args:
        rows: of LSQ runs.
        layer: quantized layer to look at.
    """
    columns = chosen(rows, layer)
    figure, axes = panels(2, len(columns), height=2.4)
    table: list[tuple[Any, ...]] = []
    for place, slot in enumerate(SLOTS):
        for axis, (row, slots) in zip(axes[place * len(columns) :], columns, strict=False):
            draw_slot(axis, slots[slot])
            axis.set_xlabel(f"{slot} / scale (codes)")
            axis.set_ylabel("density per code, share")
            axis.set_title(f"{row['model']}, {layer}, {slot}, {slots[slot]['bits']:g} bit")
            table += [
                (row["experiment"], row["hash"], slot, code, share)
                for code, share in zip(slots[slot]["codes"], slots[slot]["share"], strict=True)
            ]
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return Drawn(figure, ("experiment", "hash", "slot", "code", "share"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
