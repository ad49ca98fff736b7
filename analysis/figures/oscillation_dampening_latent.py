"""Latent weights between levels: ``python -m analysis.figures.oscillation_dampening_latent runs=GLOB [layer=NAME]``.

Left: histogram of one layer's latent weights. Right: of their distance to the nearest level, over all layers of few
bits; a peak at half a step is weights at a threshold, where codes oscillate. From ``python -m analysis.distributions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.collect import Row
from analysis.distributions import density, distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels, styles
from analysis.figures.beside import with_and_without
from analysis.labels import setting

SLUG = "oscillation_dampening"
INNER = "layer3.0.conv2"
FOLDS = 10
FINE = 20
"""Parts that a bin of the histogram is cut into before distances are taken."""


def distances(layer: Mapping[str, Any]) -> NDArray[np.float64]:
    """Shares (10,) of a layer's weights by distance to the nearest level in steps, from 0 to 0.5.

    Weights beyond the outer levels by more than half a step are left out: they are clipped.
    """
    edges, dense = (np.array(values) for values in density(layer["histogram"]))
    levels = np.array(layer["levels"])
    width = (edges[1] - edges[0]) / FINE
    places = edges[0] + width * (np.arange(len(dense) * FINE) + 0.5)
    away = np.abs(places[:, None] - levels).min(1) / (levels[1] - levels[0])
    counts, _ = np.histogram(away, FOLDS, (0, 0.5), weights=np.repeat(dense, FINE) * width)
    return np.asarray(counts / counts.sum())


def draw(rows: Sequence[Row], layer: str = INNER) -> Drawn:
    """Two histograms, the first seed of each method.

    Args:
        rows: of runs with dampening and without.
        layer: whose histogram is drawn.
    """
    groups = with_and_without(rows, SLUG)
    measured = {name: layers for name, group in groups.items() if (layers := distributions(group[0])) is not None}
    found = {
        name: {key: slots["weight"] for key, slots in layers.items() if "levels" in slots["weight"]}
        for name, layers in measured.items()
    }
    if not found:
        raise NoData(f"no run of callbacks=[{SLUG}] with distributions")
    figure, (left, right) = panels(1, 2)
    look = styles(groups)
    table: list[tuple[Any, ...]] = []
    for name, layers in found.items():
        if layer not in layers:
            raise ValueError(f"layer={layer}: use one of {', '.join(layers)}")
        line = {"color": look[name]["color"], "linestyle": look[name]["linestyle"], "label": name}
        levels = layers[layer]["levels"]
        step = levels[1] - levels[0]
        edges, dense = (np.array(values) for values in density(layers[layer]["histogram"], merge=2))
        left.stairs(dense * step, edges / step, **line)
        folded = np.mean([distances(data) for data in layers.values()], axis=0)
        borders = np.linspace(0, 0.5, FOLDS + 1)
        right.stairs(100 * folded, borders, **line)
        table += [(name, *pair) for pair in zip(borders[:-1].tolist(), (100 * folded).tolist(), strict=True)]
    left.set_xlim(-3, 3)
    left.set_xticks(range(-3, 4))
    left.set_xlabel("latent weight / scale")
    left.set_ylabel("density")
    left.set_title(f"{setting(groups[name][0])}\n{layer}")
    right.set_xlabel("distance to the nearest level / scale")
    right.set_ylabel("weights (%),\nmean over layers")
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    return Drawn(figure, ("method", "distance_from", "percent"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
