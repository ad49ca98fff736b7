"""What KURE does to weights: ``python -m analysis.figures.kurtosis_weights runs=GLOB [layer=NAME]``.

Left: histogram of one layer's weights with KURE and without. Right: kurtosis of every layer's weights; 1.8 is that of
a uniform distribution, 3 that of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.distributions import density, distributions
from analysis.figures.base import Drawn, NoData, by_label, comparable, figure_script, panels, styles
from analysis.labels import method_name, setting

METHODS = ("SGD", "KURE")
INNER = "layer3.0.conv2"


def float_runs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Float runs with KURE and the same without, by name of the method."""
    own = comparable(rows, "quantizer=float callbacks=[kurtosis]", lambda row: method_name(row) == "KURE")
    alike = [row for row in rows if setting(row) == setting(own[0]) and method_name(row) in METHODS]
    return by_label(alike, method_name, METHODS)


def draw(rows: Sequence[Row], layer: str = INNER) -> Drawn:
    """The first seed of each.

    Args:
        rows: float runs.
        layer: whose histogram is drawn.
    """
    groups = float_runs(rows)
    found = {name: layers for name, group in groups.items() if (layers := distributions(group[0])) is not None}
    if not found:
        raise NoData("no run of callbacks=[kurtosis] with distributions")
    figure, (left, right) = panels(1, 2, height=3.3)
    look = styles(METHODS)
    table: list[tuple[Any, ...]] = []
    for name, layers in found.items():
        if layer not in layers:
            raise ValueError(f"layer={layer}: use one of {', '.join(layers)}")
        edges, dense = density(layers[layer]["weight"]["histogram"], merge=3)
        left.stairs(dense, edges, color=look[name]["color"], ls=look[name]["linestyle"], label=name)
        kurtosis = [slots["weight"]["kurtosis"] for slots in layers.values()]
        right.plot(range(len(layers)), kurtosis, label=name, **look[name])
        table += [(name, key, value) for key, value in zip(layers, kurtosis, strict=True)]
    left.set_xlabel("weight / root mean square")
    left.set_ylabel("density")
    left.set_title(f"{setting(next(iter(groups.values()))[0])}\n{layer}")
    left.legend()
    names = list(next(iter(found.values())))
    right.axhline(1.8, color="0.5", lw=0.8, label="uniform (1.8)")
    right.set_xticks(range(len(names)), names, rotation=90)
    right.set_xlabel("layer")
    right.set_ylabel("kurtosis of the weights")
    right.legend()
    return Drawn(figure, ("method", "layer", "kurtosis"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
