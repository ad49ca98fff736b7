"""Freezing over training: ``python -m analysis.figures.oscillation_freezing_frozen runs=GLOB``.

Left: share of the weights whose code is frozen. Right: the frequency of oscillation above which a code freezes. Bands:
range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, panels, plot_curve, styles
from analysis.figures.beside import with_and_without
from analysis.labels import setting

SLUG = "oscillation_freezing"


def draw(rows: Sequence[Row]) -> Drawn:
    """Share and threshold over epochs."""
    groups = with_and_without(rows, SLUG)
    name, group = next((name, group) for name, group in groups.items() if SLUG in group[0]["mechanics"])
    figure, axes = panels(1, 2)
    look = styles(groups)
    labels = {"frozen": "frozen weights (%)", "threshold": "frequency above which\na code freezes (a step)"}
    table: list[tuple[Any, ...]] = []
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        found = curve(group, f"{SLUG}/{quantity}", 100 if quantity == "frozen" else 1)
        plot_curve(axis, found, look[name], name)
        table += [(name, quantity, *values) for values in zip(*found, strict=True)]
        axis.set_xlabel("epochs done")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_title(setting(group[0]))
    axes[0].legend(loc="upper left")
    return Drawn(figure, ("method", "quantity", "epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
