"""The L1 norm of the gradient over training: ``python -m analysis.figures.grad_l1_term runs=GLOB``.

Left: the norm that GRAD-L1 penalises, of the last batch of every epoch (its term over its strength). Right: validation
accuracy beside plain SGD. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, curve, figure_script, option, panels, plot_curve, styles
from analysis.figures.grad_l1_ptq import METHODS
from analysis.figures.ptq import float_runs
from analysis.labels import setting

SLUG, NAME = "grad_l1", "GRAD-L1"


def draw(rows: Sequence[Row]) -> Drawn:
    """The gradient's norm over steps and accuracy over epochs."""
    groups = float_runs(rows, SLUG, METHODS)
    strength = option(groups[NAME][0], SLUG, "strength")
    if strength == 0:
        raise NoData("no run with callbacks.grad_l1.strength above 0")
    figure, (left, right) = panels(1, 2)
    look = styles(METHODS)
    norm = curve(groups[NAME], f"train/step/{SLUG}", 1 / strength, steps=True)
    plot_curve(left, norm, look[NAME], NAME)
    table: list[tuple[Any, ...]] = [(NAME, "gradient_l1", *values) for values in zip(*norm, strict=True)]
    for name, group in groups.items():
        found = curve(group, "val/accuracy", 100)
        plot_curve(right, found, look[name], name)
        table += [(name, "val_accuracy_percent", *values) for values in zip(*found, strict=True)]
    left.set_xlabel("optimizer steps")
    left.set_ylabel("L1 norm of the loss's gradient\n(nats per unit of the weights)")
    left.set_title(f"{setting(groups[NAME][0])},\nstrength {strength:g}")
    right.set_xlabel("epochs done")
    right.set_ylabel("validation accuracy (%)")
    right.legend()
    return Drawn(figure, ("method", "quantity", "step_or_epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
