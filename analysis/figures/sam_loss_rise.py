"""The ascent step of SAM over training: ``python -m analysis.figures.sam_loss_rise runs=GLOB``.

Left: the loss of the last step of every epoch at the weights and at the point that SAM steps to. Right: their
difference, what SAM calls sharpness, on that batch. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, history, option, panels, plot_curve, styles
from analysis.figures.flatness import spread
from analysis.figures.ptq import float_runs
from analysis.labels import setting

SLUG = "sam"
CLEAN, MOVED = "at the weights", "after the ascent step"
METRICS = {CLEAN: "train/step/task", MOVED: "train/step/loss"}


def rise(row: Row) -> dict[float, float]:
    """By optimizer steps done, the loss at the perturbed point less the task's loss, as the run logged both."""
    losses = {step: value for step, _, value in history(row, METRICS[MOVED])}
    return {step: losses[step] - value for step, _, value in history(row, METRICS[CLEAN]) if step in losses}


def draw(rows: Sequence[Row]) -> Drawn:
    """Both losses and their difference over optimizer steps."""
    group = float_runs(rows, SLUG, ("SAM",))["SAM"]
    figure, (left, right) = panels(1, 2)
    look = styles(METRICS)
    table: list[tuple[Any, ...]] = []
    for name, metric in METRICS.items():
        found = curve(group, metric, steps=True)
        plot_curve(left, found, look[name], name)
        table += [(name, *values) for values in zip(*found, strict=True)]
    over = spread([rise(row) for row in group])
    plot_curve(right, over, look[CLEAN], "rise")
    table += [("rise", *values) for values in zip(*over, strict=True)]
    left.set_ylabel("training loss of a batch (nats)")
    right.set_ylabel("rise of the loss by\nthe ascent step (nats)")
    right.set_ylim(bottom=0)
    right.set_title(f"radius ρ = {option(group[0], SLUG, 'rho'):g}")
    left.set_title(setting(group[0]))
    left.legend()
    for axis in (left, right):
        axis.set_xlabel("optimizer steps")
    return Drawn(figure, ("quantity", "step", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
