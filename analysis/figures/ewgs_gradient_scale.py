"""EWGS's gradient scale against the rounding error: ``python -m analysis.figures.ewgs_gradient_scale``.

The gradient that reaches a value, over the one that reaches its code, for both signs of the latter; ``delta`` in units
of codes, 0 being the straight-through estimator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, plain, styles
from research.quant.quantizers.ewgs import ewgs_round

DELTAS = (0.0, 0.2, 1.0)


def gradient_scale(t: Tensor, delta: float, sign: float) -> Tensor:
    """Gradient at values ``t`` (N,), in units of codes, over the gradient ``sign`` at their codes."""
    t = t.clone().requires_grad_()
    rounded = ewgs_round(t, torch.tensor(delta, dtype=t.dtype))
    (gradient,) = torch.autograd.grad(rounded, t, torch.full_like(t, sign))
    return gradient / sign


def draw(rows: Sequence[Row]) -> Drawn:
    """Scale over three bins, and over the error of one; the runs play no part."""
    values = torch.linspace(-0.49, 2.49, 299, dtype=torch.float64)
    errors = torch.linspace(-0.499, 0.499, 101, dtype=torch.float64)
    figure, axes = panels(1, 2)
    cases = [(delta, sign) for delta in DELTAS for sign in ((1.0, -1.0) if delta else (1.0,))]
    labels = {
        (delta, sign): f"δ = {delta:g}, g {'>' if sign > 0 else '<'} 0" if delta else "δ = 0 (straight-through)"
        for delta, sign in cases
    }
    look, table = styles(labels.values()), []
    for axis, points in zip(axes, (values, errors), strict=True):
        for delta, sign in cases:
            scale = gradient_scale(points, delta, sign)
            axis.plot(points, scale, label=labels[delta, sign], **plain(look[labels[delta, sign]]))
            if points is errors:
                table += [(delta, sign, *pair) for pair in zip(errors.tolist(), scale.tolist(), strict=True)]
        axis.set_ylabel("gradient at the value / at its code")
    axes[0].set_xlabel("value (codes)")
    axes[1].set_xlabel("rounding error, value − code (codes)")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Drawn(figure, ("delta", "sign_of_gradient", "error", "scale"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
