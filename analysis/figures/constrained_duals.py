"""Dual variables of constrained learning: ``python -m analysis.figures.constrained_duals runs=GLOB``.

Left: the multiplier of every layer's proximity constraint over training, first seed. Right: the last ones over depth, a
ring for each seed, the mean as a bar; dark bars are layers that the first seed chose for more bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, figure_script, panels
from analysis.figures.layers import BITS, WEIGHT, by_layer, heading, logged, name_layers, plot_layers, table_of
from analysis.labels import method_name

SLUG = "constrained"
PREFIX = f"{SLUG}/dual/"


def draw(rows: Sequence[Row]) -> Drawn:
    """Multipliers over training and over depth."""
    logged(rows, PREFIX)  # there is one
    alike = [row for row in rows if SLUG in row["mechanics"] and by_layer(row, PREFIX)]
    seeds = max(by_label(alike, method_name).values(), key=len)
    duals = [by_layer(row, PREFIX) for row in seeds]
    for found in duals:
        found.pop("output", None)
    figure, (left, right) = panels(1, 2, width=4.6, height=3.4)
    plot_layers(left, duals[0])
    left.set_ylabel("dual variable")
    left.set_title(heading(seeds[0]))
    widths = by_layer(seeds[0], BITS, WEIGHT)
    table: list[tuple[Any, ...]] = []
    for place, layer in enumerate(duals[0]):
        last = [found[layer][-1][1] for found in duals]
        raised = layer in widths and widths[layer][-1][1] > widths[layer][0][1]
        right.bar(place, mean(last), 0.7, color="0.35" if raised else "0.8")
        right.plot([place] * len(last), last, "o", color="black", markersize=3, markerfacecolor="white")
    for row, found in zip(seeds, duals, strict=True):
        table += [(row["seed"], *line[1:]) for line in table_of(found, "dual")]
    name_layers(right, list(duals[0]))
    right.set_ylabel("last dual variable")
    return Drawn(figure, ("seed", "layer", "step", "dual"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
