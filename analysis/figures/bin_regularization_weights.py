"""Weights in their bins with and without bin regularization: ``python -m analysis.figures.bin_regularization_weights``.

Histogram of one layer's latent weights over the levels of its quantizer, in units of the greatest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.collect import Row
from analysis.distributions import density, distributions
from analysis.figures.base import Drawn, by_label, comparable, figure_script, option, panels
from analysis.labels import setting

SLUG = "bin_regularization"
INNER = "layer3.0.conv2"


def regularised(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs at one setting by strength, smallest first."""
    own = comparable(rows, f"callbacks=[{SLUG}]", lambda row: row["mechanics"] == [SLUG])
    return by_label(sorted(own, key=lambda row: float(option(row, SLUG, "strength"))), label)


def label(row: Row) -> str:
    """The strength, in words."""
    return f"λ = {option(row, SLUG, 'strength'):g}"


def draw(rows: Sequence[Row], layer: str = INNER) -> Drawn:
    """One panel per strength, of the first seed.

    Args:
        rows: of runs with the mechanic.
        layer: layer whose weights are shown.
    """
    groups = {name: group[0] for name, group in regularised(rows).items()}
    found = {name: layers for name, row in groups.items() if (layers := distributions(row)) is not None}
    figure, axes = panels(1, max(1, len(found)))
    table: list[tuple[Any, ...]] = []
    for axis, (name, layers) in zip(axes, found.items(), strict=True):
        if "levels" not in layers.get(layer, {}).get("weight", {}):
            inner = [key for key, slots in layers.items() if "levels" in slots["weight"]]
            raise ValueError(f"layer={layer}: no layer with weights of at most 4 bits; use one of {', '.join(inner)}")
        data = layers[layer]["weight"]
        reach = max(abs(value) for value in data["levels"])
        edges, dense = (np.array(values) for values in density(data["histogram"]))
        axis.stairs(dense * reach, edges / reach, fill=True, color="0.7", label="latent weights")
        for place, level in enumerate(data["levels"]):
            axis.axvline(level / reach, color="0.1", lw=0.8, ls="--", label=None if place else "levels")
        axis.set_xlim(-2.2, 2.2)
        axis.set_xlabel("latent weight / greatest level")
        axis.set_ylabel("density")
        axis.set_title(f"{setting(groups[name])}\n{layer}, {name}")
        table += [(name, *pair) for pair in zip((edges[:-1] / reach).tolist(), (dense * reach).tolist(), strict=True)]
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Drawn(figure, ("strength", "bin_start", "density"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
