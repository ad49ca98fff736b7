"""EWGS's delta over training, beside accuracy: ``python -m analysis.figures.ewgs_delta runs=GLOB``.

``delta`` is the mean over all quantizers, measured from the curvature in front of an epoch. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, comparable, curve, figure_script, panels, plot_curve, styles
from analysis.labels import method_name, setting

METHODS = ("LSQ", "EWGS")


def draw(rows: Sequence[Row]) -> Drawn:
    """Delta over epochs; validation accuracy of EWGS and of LSQ at the same setting."""
    own = comparable(rows, "callbacks=[ewgs]", lambda row: "ewgs" in row["mechanics"])
    runs = by_label(
        [row for row in rows if setting(row) == setting(own[0]) and method_name(row) in METHODS], method_name, METHODS
    )
    figure, (left, right) = panels(1, 2)
    look, table = styles(METHODS), []
    delta = curve(runs["EWGS"], "ewgs/delta")
    plot_curve(left, delta, look["EWGS"], "EWGS, mean over quantizers")
    left.set_ylabel("delta")
    left.set_ylim(0, 1.25 * max(*delta.high, 1e-6))
    table += [("EWGS", "delta", *values) for values in zip(*delta, strict=True)]
    for name, group in runs.items():
        found = curve(group, "val/accuracy", 100)
        plot_curve(right, found, look[name], name)
        table += [(name, "val_accuracy_percent", *values) for values in zip(*found, strict=True)]
    right.set_ylabel("validation accuracy (%)")
    for axis in (left, right):
        axis.set_xlabel("epochs done")
        axis.set_title(setting(own[0]))
        axis.legend()
    return Drawn(figure, ("method", "quantity", "epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
