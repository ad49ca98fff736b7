"""Curvature of networks trained by SGD, GRAD-L1, SAM and HERO: ``python -m analysis.figures.hero_curvature runs=GLOB``.

Greatest eigenvalue and trace of the Hessian, from ``python -m analysis.curvature``: bars are means, rings single
estimates with residual or standard error; a cross has not converged.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script
from analysis.figures.curvature import draw_curvature
from analysis.figures.hero_ptq import METHODS
from analysis.figures.ptq import float_runs
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """Two panels of bars."""
    groups = float_runs(rows, "hero", METHODS)
    return draw_curvature(groups, setting(groups["HERO"][0]))


if __name__ == "__main__":
    figure_script(draw, __file__)
