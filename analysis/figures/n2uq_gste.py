"""The generalised straight-through estimator: ``python -m analysis.figures.n2uq_gste``.

Thresholds that are not equidistant, output levels that are: the staircase of the forward pass, the ramp whose
derivative stands in for it, and that derivative beside the straight-through estimator's (equal segments).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, plain, styles
from research.quant.gste import gste_ramp, segments

LENGTHS = (0.35, 0.55, 1.1)
LEARNED, EQUAL = "learned segments (G-STE)", "equal segments (STE)"


def curves(u: Tensor, lengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, ramp and derivative of the ramp at ``u`` (N,), for segments of these lengths from 0."""
    u = u.clone().requires_grad_()
    borders, own = segments(u.new_zeros(()), torch.tensor(lengths, dtype=u.dtype))
    ramp, codes = gste_ramp(u, borders, own)
    (slope,) = torch.autograd.grad(ramp.sum(), u)
    return codes, ramp.detach(), slope


def draw(rows: Sequence[Row]) -> Drawn:
    """Staircase with ramp, and derivative, for two bits; the runs play no part."""
    u = torch.linspace(-0.3, 2.4, 541, dtype=torch.float64)
    equal = [sum(LENGTHS) / len(LENGTHS)] * len(LENGTHS)
    found = {LEARNED: curves(u, LENGTHS), EQUAL: curves(u, equal)}
    figure, (left, right) = panels(1, 2)
    look = styles(found)
    codes, ramp, _ = found[LEARNED]
    left.plot(u, codes, "k", label="forward: codes")
    left.plot(u, ramp, color="0.5", ls="--", label="backward: ramp")
    left.set_ylabel("code")
    left.legend(loc="upper left")
    for name, (_, _, slope) in found.items():
        right.plot(u, slope, label=name, **plain(look[name]))
    right.set_ylabel("derivative (codes per unit of u)")
    right.set_ylim(-0.15, 4.2)
    right.legend(loc="upper right")
    for axis in (left, right):
        axis.set_xlabel("input u")
    header = ("u", *(f"{what}_{kind}" for kind in ("learned", "equal") for what in ("codes", "ramp", "derivative")))
    columns = [column.tolist() for three in found.values() for column in three]
    return Drawn(figure, header, list(zip(u.tolist(), *columns, strict=True)))


if __name__ == "__main__":
    figure_script(draw, __file__)
