"""How CSQ's gates close: ``python -m analysis.figures.csq_planes runs=GLOB``.

Left: open planes of every layer of the first run with CSQ. Right: how far the weights are from values of the final
grid, as a part of their norm, a line for each budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, curve, figure_script, option, panels, plot_curve, styles
from analysis.figures.layers import heading, logged, plot_layers, table_of
from research.quant.budget import budgets_from_config

SLUG = "csq"


def _budget(row: Row) -> str:
    """The first budget of a run in words."""
    first = budgets_from_config(option(row, SLUG, "budget"))[0]
    return f"{first.kind} {first.value:g}"


def draw(rows: Sequence[Row]) -> Drawn:
    """Planes by layer, distance from exact values by budget."""
    row, planes = logged(rows, f"{SLUG}/planes/")
    alike = [other for other in rows if SLUG in other["mechanics"] and other["model"] == row["model"]]
    groups = by_label(alike, _budget)
    figure, (left, right) = panels(1, 2, width=4.6)
    plot_layers(left, planes)
    left.set_ylabel("open planes")
    left.set_title(f"{heading(row)}, {_budget(row)}")
    table: list[tuple[Any, ...]] = list(table_of(planes, "planes"))
    for name, look in styles(groups).items():
        found = curve(groups[name], f"{SLUG}/distance", steps=True)
        plot_curve(right, found, look, name)
        table += [(f"distance, {name}", "", step, value) for step, value in zip(found.x, found.mean, strict=True)]
    right.set_yscale("log")
    right.set_xlabel("optimizer steps")
    right.set_ylabel("distance from exact values")
    right.legend()
    return Drawn(figure, ("quantity", "layer", "step", "value"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
