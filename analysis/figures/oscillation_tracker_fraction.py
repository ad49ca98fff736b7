"""Oscillating weights over training: ``python -m analysis.figures.oscillation_tracker_fraction runs=GLOB``.

Left: share of the weights whose frequency of oscillation is above the tracker's limit. Right: share of those that have
oscillated at least once. By method; bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, comparable, curve, figure_script, option, panels, plot_curve, styles
from analysis.labels import method_name, setting

SLUG = "oscillation_tracker"
ORDER = ("LSQ", "LSQ + dampening", "LSQ + freezing")


def tracked(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs whose oscillations were counted, of one setting, by method."""
    return by_label(comparable(rows, f"callbacks=[{SLUG}]", lambda row: SLUG in row["mechanics"]), method_name, ORDER)


def draw(rows: Sequence[Row]) -> Drawn:
    """Two shares over epochs, a line per method."""
    groups = tracked(rows)
    figure, axes = panels(1, 2)
    first = next(iter(groups.values()))[0]
    look = styles(groups)
    table: list[tuple[Any, ...]] = []
    for axis, share in zip(axes, ("oscillating", "ever_oscillated"), strict=True):
        for name, group in groups.items():
            found = curve(group, f"{SLUG}/{share}", 100)
            plot_curve(axis, found, look[name], name)
            table += [(name, share, *values) for values in zip(*found, strict=True)]
        axis.set_xlabel("epochs done")
        axis.set_ylim(bottom=0)
        axis.set_title(setting(first))
    limit = option(first, SLUG, "limit")
    axes[0].set_ylabel(f"oscillating weights (%),\nfrequency > {limit:g} a step")
    axes[1].set_ylabel("weights that have\never oscillated (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return Drawn(figure, ("method", "share", "epoch", "mean_percent", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
