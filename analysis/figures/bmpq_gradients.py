"""Bit gradients and the widths they chose: ``python -m analysis.figures.bmpq_gradients runs=GLOB [norm=per_bit]``.

Left: the normalised bit gradient of every layer at the ends of the epochs, the mean over the interval so far; light
lines are late ones. Right: the widths over training. Of the first run with BMPQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, option, panels
from analysis.figures.layers import by_layer, heading, logged, name_layers, plot_map, searched_widths, table_of

SLUG = "bmpq"
NORMS = ("raw", "per_bit")


def draw(rows: Sequence[Row], norm: str = "") -> Drawn:
    """Gradients over depth, widths over training.

    Args:
        rows: of runs.
        norm: ``raw`` or ``per_bit``; that which the run used unless given.
    """
    if norm not in ("", *NORMS):
        raise ValueError(f"norm={norm}: use {' or '.join(NORMS)}, or leave it out")
    row, _ = logged(rows, f"{SLUG}/enbg_raw/")
    norm = norm or option(row, SLUG, "norm")
    found = by_layer(row, f"{SLUG}/enbg_{norm}/")
    figure, (left, right) = panels(1, 2, width=4.6, height=3.6)
    steps = [step for step, _ in next(iter(found.values()))]
    shades = matplotlib.colormaps["viridis"]
    for place, step in enumerate(steps):
        heights = [values[place][1] for values in found.values()]
        end = place in (0, len(steps) - 1)
        colour = shades(0.9 * place / max(len(steps) - 1, 1))
        left.plot(
            range(len(found)), heights, color=colour, marker=".", linewidth=0.8, label=f"step {step}" if end else None
        )
    left.set_yscale("log")
    name_layers(left, list(found))
    left.set_ylabel(f"normalised bit gradient ({norm})")
    left.set_title(heading(row))
    left.legend()
    widths = searched_widths(row, found)
    plot_map(right, widths)
    table: list[tuple[Any, ...]] = [*table_of(found, f"enbg_{norm}"), *table_of(widths, "bits")]
    return Drawn(figure, ("quantity", "layer", "step", "value"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
