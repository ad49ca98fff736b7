"""Learned thresholds over the inputs they cut: ``python -m analysis.figures.n2uq_thresholds runs=GLOB``.

For three layers of a run of N2UQ: the staircase that training learned, the one with thresholds halfway between the same
levels, and the histogram of the layer's inputs on test images. Units: root mean square of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.collect import Row
from analysis.distributions import density, distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels
from analysis.labels import setting

REACH = 4.0


def staircase(thresholds: Sequence[float], levels: Sequence[float]) -> tuple[list[float], list[float]]:
    """Corners of the step function from 0 to the figure's end."""
    x = [0.0, *(value for threshold in thresholds for value in (threshold, threshold)), REACH]
    y = [level for level in levels for _ in range(2)]
    return x, y


def chosen(rows: Sequence[Row]) -> tuple[Row, dict[str, dict[str, Any]]]:
    """The first run with learned thresholds, and the inputs of its layers that have some."""
    for row in rows:
        layers = distributions(row) if "n2uq" in str(row["config"]["quantizer"]["input"]) else None
        found = {name: slots["input"] for name, slots in (layers or {}).items() if "thresholds" in slots["input"]}
        if found:
            return row, found
    raise NoData("no run of quantizer=n2uq with distributions")


def draw(rows: Sequence[Row]) -> Drawn:
    """The first, the middle and the last layer."""
    row, layers = chosen(rows)
    names = list(layers)
    names = list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    figure, axes = panels(1, len(names), width=3.3)
    table: list[tuple[Any, ...]] = []
    for axis, name in zip(axes, names, strict=True):
        data = layers[name]
        edges, dense = (np.array(values) for values in density(data["histogram"], merge=2))
        top = float(np.sort(dense)[-2])  # the zeros that the ReLU makes would hide all others
        shape = np.minimum(dense / top, 1) * data["levels"][-1] / 2
        axis.stairs(shape, edges, fill=True, color="0.85", label="density of inputs (any unit, zeros cut off)")
        halfway = [(low + high) / 2 for low, high in pairwise(data["levels"])]
        axis.plot(*staircase(data["thresholds"], data["levels"]), "k", label="learned thresholds")
        axis.plot(*staircase(halfway, data["levels"]), color="0.4", ls="--", label="thresholds halfway between levels")
        axis.set_xlim(0, REACH)
        axis.set_xlabel("input / its root mean square")
        axis.set_ylabel("quantized input\n(root mean squares of the input)")
        axis.set_title(f"{setting(row)}\n{name}")
        table += [
            (name, code, level, threshold)
            for code, level, threshold in zip(data["codes"], data["levels"], [*data["thresholds"], ""], strict=True)
        ]
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Drawn(figure, ("layer", "code", "level", "threshold_above"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
