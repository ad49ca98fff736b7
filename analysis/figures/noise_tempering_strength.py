"""Noise and gradient scale of noise tempering over training: ``python -m analysis.figures.noise_tempering_strength``.

Left: strength of the noise by its decay kappa. Right: mean scale delta of the gradient where it is learned, with noise
and without. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import (
    Curve,
    Drawn,
    by_label,
    comparable,
    curve,
    figure_script,
    option,
    panels,
    plot_curve,
    styles,
)
from analysis.labels import setting

SLUG = "noise_tempering"


def tempered(rows: Sequence[Row]) -> list[Row]:
    """Runs of noise tempering on LSQ at one setting, uniform noise in the forward pass."""
    return comparable(
        rows,
        f"callbacks=[{SLUG}], noise_dist=uniform, noise_site=forward, grad_scale=elementwise",
        lambda row: (
            set(row["mechanics"]) == {SLUG}
            and option(row, SLUG, "noise_dist") == "uniform"
            and option(row, SLUG, "noise_site") == "forward"
            and option(row, SLUG, "grad_scale") == "elementwise"
        ),
    )


def kappa_runs(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Runs with full noise and a learned gradient scale from the default start, by kappa."""
    own = [
        row
        for row in rows
        if option(row, SLUG, "lambda_0") == 1
        and option(row, SLUG, "lambda_final") is None
        and option(row, SLUG, "delta") is None
        and option(row, SLUG, "delta_learn") == "carrier"
    ]
    groups = by_label(own, lambda row: f"{option(row, SLUG, 'kappa'):g}")
    return {float(kappa): groups[kappa] for kappa in sorted(groups, key=float)}


def no_noise(rows: Sequence[Row]) -> list[Row]:
    """The same without noise."""
    return [
        row
        for row in rows
        if option(row, SLUG, "lambda_0") == 0
        and option(row, SLUG, "delta") is None
        and option(row, SLUG, "delta_learn") == "carrier"
    ]


def draw(rows: Sequence[Row]) -> Drawn:
    """Strength and delta over epochs."""
    own = tempered(rows)
    by_kappa = {f"κ = {kappa:g}": group for kappa, group in kappa_runs(own).items()}
    groups = by_kappa | ({"no noise": group} if (group := no_noise(own)) else {})
    figure, (left, right) = panels(1, 2)
    look, table = styles(groups), []
    for name, group in groups.items():
        for axis, metric in ((left, "strength"), (right, "delta")):
            found: Curve = curve(group, f"{SLUG}/{metric}")
            plot_curve(axis, found, look[name], name)
            table += [(name, metric, *values) for values in zip(*found, strict=True)]
    left.set_ylabel("strength λ of the noise\n(share of each quantization error)")
    right.set_ylabel("scale δ of the gradient\n(mean over quantizers)")
    for axis in (left, right):
        axis.set_xlabel("epochs done")
        axis.set_title(setting(own[0]))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawn(figure, ("runs", "quantity", "epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
