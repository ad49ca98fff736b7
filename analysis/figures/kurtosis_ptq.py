"""Accuracy after post-training quantization, with KURE and without: ``python -m analysis.figures.kurtosis_ptq``.

Float runs whose weights were quantized by ``python -m research.evaluate run=DIR ptq=[...]``; bands: range over seeds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from analysis.collect import Row
from analysis.figures.base import Curve, Drawn, NoData, figure_script, panels, plot_curve, styles
from analysis.figures.kurtosis_weights import METHODS, float_runs
from analysis.labels import setting


def ptq_curve(rows: Sequence[Row], kind: str = "minmax") -> Curve:
    """Accuracy in percent over the bits of the weights, for runs that differ in their seed; empty without records.

    Args:
        rows: of the seeds.
        kind: range of the weights, ``minmax`` or ``mse``.
    """
    found: dict[float, list[float]] = {}
    column = re.compile(r"ptq_(\d+)" if kind == "minmax" else rf"ptq_{kind}_(\d+)")
    for row in rows:
        for key, accuracy in row.items():
            if match := column.fullmatch(key):
                found.setdefault(int(match[1]), []).append(100 * accuracy)
    x = sorted(found)
    return Curve(x, [mean(found[i]) for i in x], [min(found[i]) for i in x], [max(found[i]) for i in x])


def draw(rows: Sequence[Row]) -> Drawn:
    """A curve per method, and the float accuracies as lines."""
    groups = float_runs(rows)
    curves = {name: found for name, group in groups.items() if (found := ptq_curve(group)).x}
    if "KURE" not in curves:
        raise NoData("no run of callbacks=[kurtosis] with a record of research.evaluate ptq=[...]")
    figure, (axis,) = panels(1, 1, width=4.2)
    look, table = styles(METHODS), []
    for name, found in curves.items():
        plot_curve(axis, found, look[name], name)
        full = 100 * mean(row["accuracy"] for row in groups[name])
        line = look[name]
        axis.axhline(full, color=line["color"], ls=line["linestyle"], lw=0.6, label=f"{name}, float weights")
        table += [(name, bits, *values) for bits, *values in zip(*found, strict=True)]
        table += [(name, 32, full, full, full)]
    axis.set_xticks(sorted({bits for found in curves.values() for bits in found.x}))
    axis.invert_xaxis()
    axis.set_xlabel("bits of the weights, min-max range per tensor")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(setting(next(iter(groups.values()))[0]))
    axis.legend(loc="lower left")
    return Drawn(figure, ("method", "bits", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
