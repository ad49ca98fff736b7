"""A slice of the loss by case of SAQ: ``python -m analysis.figures.saq_landscape runs=GLOB``.

Along one random direction, filter-normalised and the same for all runs, around the quantized weights; from
``python -m analysis.landscape``.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, styles
from analysis.figures.flatness import kept, plot_slices
from analysis.figures.saq_cases import ORDER, by_case
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """A line per case."""
    groups = by_case(rows)
    figure, (axis,) = panels(1, 1, width=4.4)
    table = plot_slices(axis, kept(groups, "landscape", dimensions=1, site="quantized"), styles(ORDER))
    axis.set_title(setting(next(iter(groups.values()))[0]))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Drawn(figure, ("case", "position", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
