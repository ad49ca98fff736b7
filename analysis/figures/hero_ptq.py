"""Accuracy after post-training quantization by HERO: ``python -m analysis.figures.hero_ptq runs=GLOB``.

Float runs of SGD, GRAD-L1, SAM and HERO whose weights were quantized by ``python -m research.evaluate run=DIR
ptq=[...]``; bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script
from analysis.figures.ptq import draw_ptq, float_runs

METHODS = ("SGD", "GRAD-L1", "SAM", "HERO")


def draw(rows: Sequence[Row]) -> Drawn:
    """A curve per method, the float accuracies at its left."""
    return draw_ptq(float_runs(rows, "hero", METHODS), METHODS)


if __name__ == "__main__":
    figure_script(draw, __file__)
