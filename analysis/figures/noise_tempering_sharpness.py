"""Sharpness by method: ``python -m analysis.figures.noise_tempering_sharpness runs=GLOB``.

How far the training loss rises at worst in a ball around the quantized weights, from ``python -m analysis.sharpness
norm=filter``: every filter moves by a share of its own norm, as EWGS gives its weights another scale than LSQ.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, styles
from analysis.figures.flatness import kept, plot_sharpness
from analysis.figures.noise_tempering_curvature import ORDER, by_method
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """A line per method over the radius."""
    groups = by_method(rows)
    figure, (axis,) = panels(1, 1, width=4.4)
    table = plot_sharpness(axis, kept(groups, "sharpness", ("rho",), form="worst", norm="filter"), styles(ORDER))
    axis.set_title(setting(next(iter(groups.values()))[0]))
    axis.legend()
    return Drawn(figure, ("method", "rho", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
