"""Accuracy after post-training quantization by GRAD-L1: ``python -m analysis.figures.grad_l1_ptq runs=GLOB``.

Float runs of SGD and GRAD-L1 whose weights were quantized by ``python -m research.evaluate run=DIR ptq=[...]``;
bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script
from analysis.figures.ptq import draw_ptq, float_runs

METHODS = ("SGD", "GRAD-L1")


def draw(rows: Sequence[Row]) -> Drawn:
    """A curve per method, the float accuracies at its left."""
    return draw_ptq(float_runs(rows, "grad_l1", METHODS), METHODS)


if __name__ == "__main__":
    figure_script(draw, __file__)
