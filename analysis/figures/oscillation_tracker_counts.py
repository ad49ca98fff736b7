"""How often weights oscillated in a run: ``python -m analysis.figures.oscillation_tracker_counts runs=GLOB``.

Left: share of the weights that oscillated at least n times. Right: share of those that oscillated at all, by layer.
From ``python -m analysis.oscillation``; the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, styles
from analysis.figures.flatness import kept
from analysis.figures.oscillation_tracker_fraction import tracked
from analysis.labels import setting


def at_least(layers: Mapping[str, Sequence[int]]) -> list[float]:
    """Percent of all weights that oscillated at least 0, 1, 2, ... times, from the counts of the layers."""
    counts = list(layers.values())
    weights = sum(map(sum, counts))
    return [100 * sum(sum(layer[n:]) for layer in counts) / weights for n in range(max(map(len, counts)))]


def draw(rows: Sequence[Row]) -> Drawn:
    """Shares by number and by layer."""
    groups = tracked(rows)
    found = kept(groups, "oscillation")
    figure, (left, right) = panels(1, 2, height=3.2)
    look = styles(groups)
    table: list[tuple[Any, ...]] = []
    for name, runs in found.items():
        seeds = [record["values"]["counts"] for (record,) in runs]
        shares = [at_least(layers) for layers in seeds]
        numbers = range(1, max(map(len, shares)))
        over = [mean(share[n] if n < len(share) else 0.0 for share in shares) for n in numbers]
        left.plot(numbers, over, label=name, **look[name])
        layers = list(seeds[0])
        by_layer = [mean(100 * (1 - seed[key][0] / sum(seed[key])) for seed in seeds) for key in layers]
        right.plot(range(len(layers)), by_layer, label=name, **look[name])
        table += [(name, "at_least", *pair) for pair in zip(numbers, over, strict=True)]
        table += [(name, "by_layer", *pair) for pair in zip(layers, by_layer, strict=True)]
    steps = next(iter(found.values()))[0][0]["values"]["steps"]
    left.set_yscale("log")
    left.set_xlabel(f"oscillations n in {steps} steps")
    left.set_ylabel("weights that oscillated\nat least n times (%)")
    left.set_title(setting(next(iter(groups.values()))[0]))
    right.set_xticks(range(len(layers)), layers, rotation=90)
    right.set_xlabel("layer")
    right.set_ylabel("weights that oscillated (%)")
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    return Drawn(figure, ("method", "share", "number_or_layer", "percent"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
