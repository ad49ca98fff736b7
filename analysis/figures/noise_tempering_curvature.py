"""Curvature of the quantized network by method: ``python -m analysis.figures.noise_tempering_curvature runs=GLOB``.

Greatest eigenvalue and trace of the Hessian by the de-quantized weights, from ``python -m analysis.curvature``: bars
are means, rings single estimates with residual or standard error; a cross has not converged. EWGS is left out: it gives
its weights another scale, and with it their curvature another unit.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, figure_script, option
from analysis.figures.curvature import draw_curvature
from analysis.figures.noise_tempering_strength import SLUG, tempered
from analysis.labels import method_name, setting

NOISE, TEMPERED = "noise only", "noise tempering"
ORDER = ("LSQ", "EWGS", NOISE, TEMPERED)


def name_of(row: Row) -> str | None:
    """``LSQ``, ``EWGS``, noise with the gradient's scale or without it at the default decay; None for other runs."""
    if method_name(row) in ("LSQ", "EWGS"):
        return method_name(row)
    if option(row, SLUG, "lambda_0") != 1 or option(row, SLUG, "kappa") != 5:
        return None
    if option(row, SLUG, "lambda_final") is not None:
        return None
    if option(row, SLUG, "delta_learn") == "fixed":
        return NOISE if option(row, SLUG, "delta") == 0 else None
    return TEMPERED if option(row, SLUG, "delta") is None else None


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs by `name_of`, of the setting of noise tempering's."""
    own = tempered(rows)
    others = [row for row in rows if method_name(row) in ORDER and setting(row) == setting(own[0])]
    named = [row for row in [*others, *own] if name_of(row) in ORDER]
    return by_label(named, lambda row: str(name_of(row)), ORDER)


def draw(rows: Sequence[Row]) -> Drawn:
    """Two panels of bars."""
    groups = {name: group for name, group in by_method(rows).items() if name != "EWGS"}
    return draw_curvature(groups, setting(next(iter(groups.values()))[0]))


if __name__ == "__main__":
    figure_script(draw, __file__)
