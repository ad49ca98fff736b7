"""How SDQ chooses: ``python -m analysis.figures.sdq_choice runs=GLOB``.

Left: for every layer the certainty of the higher of its two widths, up to the end of the search; where it falls below
the threshold the layer goes down by one width and starts anew. Right: the widths over training. Of the first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, option, panels
from analysis.figures.layers import heading, logged, plot_layers, plot_map, searched_widths, table_of

SLUG = "sdq"


def draw(rows: Sequence[Row]) -> Drawn:
    """Probabilities and widths of one search."""
    row, betas = logged(rows, f"{SLUG}/beta/")
    figure, (left, right) = panels(1, 2, width=4.6)
    plot_layers(left, betas)
    left.axhline(option(row, SLUG, "threshold"), color="0.5", linewidth=0.8, linestyle="--")
    left.set_ylim(0, 1)
    left.set_ylabel("probability of the higher width")
    left.set_title(heading(row))
    widths = searched_widths(row, betas)
    plot_map(right, widths)
    table: list[tuple[Any, ...]] = [*table_of(betas, "beta"), *table_of(widths, "bits")]
    return Drawn(figure, ("quantity", "layer", "step", "value"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
