"""The estimator of binary networks over training: ``python -m analysis.figures.dir_net_estimator runs=GLOB``.

Left: ``t`` as a run of IR-Net's schedule logged it, and ``k = max(1 / t, 1)``. Right: the derivative of ``k tanh(t u)``
that stands in for the sign's at the first, a middle and the last of these epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.collect import Row
from analysis.figures.base import Drawn, comparable, curve, figure_script, option, panels, plain, styles
from analysis.labels import setting
from research.quant.quantizers.binary import decaying_sign

SLUG = "dir_net"


def binary_runs(rows: Sequence[Row]) -> list[Row]:
    """Runs of the mechanic at one setting."""
    return comparable(rows, f"quantizer=binary callbacks=[{SLUG}]", lambda row: row["mechanics"] == [SLUG])


def estimator(row: Row) -> str:
    """What a run does to the derivative of the sign, in words."""
    if option(row, SLUG, "t_min") == option(row, SLUG, "t_max"):
        return "constant"
    plain = option(row, SLUG, "dte") == "ede" or option(row, SLUG, "eps") == 0
    return "EDE (IR-Net)" if plain else "DTE (reconstruction)"


def derivative(u: Tensor, t: float) -> Tensor:
    """Derivative of the sign's stand-in at ``u`` (N,)."""
    u = u.clone().requires_grad_()
    one = torch.tensor(t, dtype=u.dtype)
    return torch.autograd.grad(decaying_sign(u, one, torch.clamp(1 / one, min=1)).sum(), u)[0]


def draw(rows: Sequence[Row]) -> Drawn:
    """Schedule and derivative of one run whose estimator sharpens."""
    moving = comparable(binary_runs(rows), "a t that changes", lambda row: estimator(row) != "constant")
    found = curve(moving[:1], "dir_net/t")
    figure, (left, right) = panels(1, 2, width=3.9)
    look = styles(("t", "k"))
    left.plot(found.x, found.mean, label="t, sharpness", **look["t"])
    left.plot(found.x, [max(1 / t, 1.0) for t in found.mean], label="k = max(1 / t, 1)", **look["k"])
    left.set_yscale("log")
    left.set_xlabel("epoch")
    left.set_ylabel("parameters of k tanh(t u)")
    left.set_title(setting(moving[0]))
    left.legend(loc="upper center")
    u = torch.linspace(-3, 3, 301, dtype=torch.float64)
    places = list(dict.fromkeys([0, len(found.x) // 2, len(found.x) - 1]))
    names = [f"epoch {found.x[i]:g}: t = {found.mean[i]:.2g}" for i in places]
    lines, table = styles(names), []
    for place, name in zip(places, names, strict=True):
        slope = derivative(u, found.mean[place])
        right.plot(u, slope, label=name, **plain(lines[name]))
        table += [(found.x[place], found.mean[place], *pair) for pair in zip(u.tolist(), slope.tolist(), strict=True)]
    right.set_xlabel("value u in front of the sign")
    right.set_ylabel("derivative in place of the sign's")
    right.legend(loc="upper left")
    return Drawn(figure, ("epoch", "t", "u", "derivative"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
