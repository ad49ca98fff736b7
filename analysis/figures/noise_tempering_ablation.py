"""Noise x scale of the gradient of noise tempering: ``python -m analysis.figures.noise_tempering_ablation runs=GLOB``.

Test accuracy of the finalised network: mean over seeds as the large marker, every seed as a ring.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.lines import Line2D

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, by_label, figure_script, option, panels, plot_points, styles
from analysis.figures.noise_tempering_strength import SLUG, tempered
from analysis.labels import setting

SCALES = ("no scale", "fixed", "learned")
NOISES = ("no noise", "noise")


def cell(row: Row) -> tuple[str, str]:
    """Noise and scale of the gradient of a run, in words."""
    learned = option(row, SLUG, "delta_learn") != "fixed"
    scale = "learned" if learned else "no scale" if option(row, SLUG, "delta") == 0 else "fixed"
    return NOISES[option(row, SLUG, "lambda_0") > 0], scale


def draw(rows: Sequence[Row]) -> Drawn:
    """A mark for each cell of the ablation, at the default decay and start of the scale."""
    own = [
        row
        for row in tempered(rows)
        if option(row, SLUG, "kappa") == 5
        and option(row, SLUG, "lambda_0") in (0, 1)
        and option(row, SLUG, "lambda_final") is None
        and option(row, SLUG, "delta_learn") in ("fixed", "carrier")
        and option(row, SLUG, "delta") in ((None, 0) if option(row, SLUG, "delta_learn") == "fixed" else (None,))
    ]
    groups = by_label(own, lambda row: ", ".join(cell(row)), [f"{noise}, {s}" for s in SCALES for noise in NOISES])
    if len(groups) < 2:
        raise NoData("no two cells of the ablation (lambda_0: 0, 1; delta_learn: fixed, carrier; kappa: 5)")
    values = {name: [100 * row["accuracy"] for row in group] for name, group in groups.items()}
    figure, (axis,) = panels(1, 1, width=4.6)
    known = styles(NOISES)
    plot_points(axis, values, {name: known[name.split(", ")[0]] for name in values})
    axis.set_xticks(range(len(values)), [name.split(", ")[1] for name in values])
    axis.set_xlabel("scale δ of the gradient")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(setting(own[0]))
    handles = [Line2D([], [], label=name, **{**known[name], "linestyle": "none"}) for name in NOISES]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    table = [(*name.split(", "), row["seed"], row["accuracy"]) for name, group in groups.items() for row in group]
    return Drawn(figure, ("noise", "gradient_scale", "seed", "accuracy"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
