"""Sharpness by case of SAQ: ``python -m analysis.figures.saq_sharpness runs=GLOB``.

How far the training loss rises at worst in a ball around the quantized weights, from ``python -m analysis.sharpness``.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, styles
from analysis.figures.flatness import kept, plot_sharpness
from analysis.figures.saq_cases import ORDER, by_case
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """A line per case over the radius."""
    groups = by_case(rows)
    figure, (axis,) = panels(1, 1, width=4.4)
    table = plot_sharpness(axis, kept(groups, "sharpness", ("rho",), form="worst", norm="plain"), styles(ORDER))
    axis.set_title(setting(next(iter(groups.values()))[0]))
    axis.legend()
    return Drawn(figure, ("case", "rho", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
