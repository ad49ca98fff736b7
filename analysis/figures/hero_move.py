"""What HERO penalises, over training: ``python -m analysis.figures.hero_move runs=GLOB``.

Left: norm of the gradient at the perturbed point and of its move from the weights' own, which is to first order the
Hessian times the perturbation. Right: the penalty as it is in the loss. Of the last batch of every epoch after the
warm-up; bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, option, panels, plot_curve, styles
from analysis.figures.ptq import float_runs
from analysis.labels import setting

SLUG = "hero"
NORMS = {"gradient, perturbed point": "hero_gradient", "its move by the perturbation": "hero_move"}


def draw(rows: Sequence[Row]) -> Drawn:
    """Norms and penalty over optimizer steps."""
    group = float_runs(rows, SLUG, ("HERO",))["HERO"]
    figure, (left, right) = panels(1, 2)
    look = styles(NORMS)
    table: list[tuple[Any, ...]] = []
    for name, metric in NORMS.items():
        found = curve(group, f"train/step/{metric}", steps=True)
        plot_curve(left, found, look[name], name)
        table += [(metric, *values) for values in zip(*found, strict=True)]
    penalty = curve(group, f"train/step/{SLUG}", steps=True)
    plot_curve(right, penalty, look[next(iter(NORMS))], "penalty")
    table += [("penalty", *values) for values in zip(*penalty, strict=True)]
    left.set_ylabel("L2 norm over all parameters\n(nats per unit of the weights)")
    left.set_title(setting(group[0]))
    left.set_ylim(0, 1.3 * max(row[4] for row in table if row[0] != "penalty"))
    left.legend(loc="upper right")
    right.set_ylabel("penalty in the loss (nats)")
    right.set_title(f"radius {option(group[0], SLUG, 'radius'):g}, strength {option(group[0], SLUG, 'strength'):g}")
    for axis in (left, right):
        axis.set_xlabel("optimizer steps")
    return Drawn(figure, ("quantity", "step", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
