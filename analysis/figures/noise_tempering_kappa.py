"""Accuracy against the decay of the noise: ``python -m analysis.figures.noise_tempering_kappa runs=GLOB``.

``kappa`` 0 never decays; no noise at all is the limit of an infinite one. Dots: seeds; the line joins their means.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, figure_script, panels
from analysis.figures.noise_tempering_strength import kappa_runs, no_noise, tempered
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """Test accuracy of the finalised network over kappa."""
    own = tempered(rows)
    groups, silent = kappa_runs(own), no_noise(own)
    if len(groups) < 2:
        raise NoData("no two values of callbacks.noise_tempering.kappa")
    accuracy = {kappa: [100 * row["accuracy"] for row in group] for kappa, group in groups.items()}
    figure, (axis,) = panels(1, 1, width=4.2)
    axis.plot(list(accuracy), [mean(seeds) for seeds in accuracy.values()], "-ok", label="mean over seeds")
    for place, (kappa, seeds) in enumerate(accuracy.items()):
        label = "one seed" if place == 0 else None
        axis.plot([kappa] * len(seeds), seeds, "ok", markersize=4, markerfacecolor="white", label=label)
    still = [100 * row["accuracy"] for row in silent]
    if still:
        axis.axhline(mean(still), color="0.4", ls="--", label="no noise (κ = ∞), mean")
        axis.axhspan(min(still), max(still), color="0.85", label="no noise, range over seeds")
    axis.set_xlabel("decay κ of the noise over the run")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(setting(own[0]))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    table = [(kappa, row["seed"], row["accuracy"]) for kappa, group in groups.items() for row in group]
    return Drawn(figure, ("kappa", "seed", "accuracy"), [*table, *(("inf", r["seed"], r["accuracy"]) for r in silent)])


if __name__ == "__main__":
    figure_script(draw, __file__)
