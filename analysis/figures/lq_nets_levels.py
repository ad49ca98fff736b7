"""Levels that LQ-Nets learned, layer by layer: ``python -m analysis.figures.lq_nets_levels runs=GLOB``.

Levels in units of the root mean square of what they quantize, so that layers can be compared; LSQ's, which are
equidistant, beside them. Bases of weights belong to output channels: their levels are means over channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from analysis.collect import Row
from analysis.distributions import Layers, distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels, styles
from analysis.labels import method_name, setting

METHODS = ("LSQ", "LQ-Nets")
SLOTS = ("weight", "input")


def chosen(rows: Sequence[Row]) -> dict[str, tuple[Row, Layers]]:
    """A run of LQ-Nets with distributions, the narrowest that has quantized inputs, and one of LSQ at its setting."""
    own = sorted((row for row in rows if method_name(row) == "LQ-Nets"), key=lambda row: setting(row))
    for row in own:
        layers = distributions(row)
        if layers is None or not any("levels" in slots["input"] for slots in layers.values()):
            continue
        found = {"LQ-Nets": (row, layers)}
        for other in rows:
            if method_name(other) == "LSQ" and setting(other) == setting(row) and (plain := distributions(other)):
                return {"LSQ": (other, plain)} | found
        return found
    raise NoData("no run of quantizer=lq_nets with distributions")


def draw(rows: Sequence[Row]) -> Drawn:
    """A column of levels per layer, for weights and for inputs."""
    found = chosen(rows)
    row, layers = found["LQ-Nets"]
    names = [name for name, slots in layers.items() if all("levels" in slots[slot] for slot in SLOTS)]
    figure, axes = panels(1, 2, width=4.2, height=3.6)
    look, table = styles(METHODS), []
    shift = {"LSQ": -0.15, "LQ-Nets": 0.15}
    for axis, slot in zip(axes, SLOTS, strict=True):
        for label, (_, levels) in found.items():
            for place, name in enumerate(names):
                values: list[float] = levels[name][slot]["levels"]
                colour, marker = look[label]["color"], look[label]["marker"]
                axis.plot([place + shift[label]] * len(values), values, "-", color=colour, lw=0.6)
                axis.plot([place + shift[label]] * len(values), values, marker, color=colour, markersize=4)
                table += [(label, slot, name, i, value) for i, value in enumerate(values)]
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_xlabel("layer")
        axis.set_ylabel(f"{slot} level\n(root mean squares of the {slot})")
        axis.set_title(setting(row))
    handles: list[Any] = [
        Line2D([], [], label=label, **{**look[label], "linestyle": "-", "linewidth": 0.6}) for label in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return Drawn(figure, ("method", "slot", "layer", "level", "value"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
