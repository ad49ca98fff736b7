"""Accuracy with distillation and without: ``python -m analysis.figures.distillation_accuracy runs=GLOB``.

Left: validation accuracy over epochs (bands: range over seeds). Right: test accuracy of the finalised network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, panels, plot_curve, plot_points, styles
from analysis.figures.distillation_loss import distilled
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """The quantizer alone and with distillation."""
    groups = distilled(rows)
    figure, (left, right) = panels(1, 2)
    look = styles(groups)
    table: list[tuple[Any, ...]] = []
    for name, group in groups.items():
        found = curve(group, "val/accuracy", 100)
        plot_curve(left, found, look[name], name)
        table += [(name, "val", *values) for values in zip(*found, strict=True)]
    tests = {name: [100 * row["accuracy"] for row in group] for name, group in groups.items()}
    plot_points(right, tests, look)
    for name, seeds in tests.items():
        table += [(name, "test", "", sum(seeds) / len(seeds), min(seeds), max(seeds))]
    left.set_xlabel("epochs done")
    left.set_ylabel("validation accuracy (%)")
    left.legend(loc="lower right")
    right.set_xlabel("method")
    right.set_ylabel("test accuracy (%), rings: seeds")
    for axis in (left, right):
        axis.set_title(setting(next(iter(groups.values()))[0]))
    return Drawn(figure, ("method", "part", "epoch", "mean_percent", "low_percent", "high_percent"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
