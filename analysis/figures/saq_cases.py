"""The three cases of SAQ over training: ``python -m analysis.figures.saq_cases runs=GLOB``.

Left: how far the ascent step raises the loss of the last batch of every epoch. Right: validation accuracy, beside
training without SAQ. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, option, panels, plot_curve, styles
from analysis.figures.beside import with_and_without
from analysis.figures.flatness import spread
from analysis.figures.sam_loss_rise import rise
from analysis.labels import setting

SLUG = "saq"
PLAIN = "without SAQ"
CASES = {1: "case 1", 2: "case 2 (SAM)", 3: "case 3 (SAQ)"}
ORDER = (PLAIN, *CASES.values())


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs of SAQ alone by case, those of the same quantizer without it first; all of one setting."""
    return with_and_without(rows, SLUG, lambda row: CASES.get(option(row, SLUG, "case"), PLAIN), ORDER)


def draw(rows: Sequence[Row]) -> Drawn:
    """Rise of the loss over steps and accuracy over epochs, by case."""
    groups = by_case(rows)
    figure, (left, right) = panels(1, 2)
    look = styles(ORDER)
    table: list[tuple[Any, ...]] = []
    for name, group in groups.items():
        if name != PLAIN:
            over = spread([rise(row) for row in group])
            plot_curve(left, over, look[name], name)
            table += [(name, "rise", *values) for values in zip(*over, strict=True)]
        found = curve(group, "val/accuracy", 100)
        plot_curve(right, found, look[name], name)
        table += [(name, "val_accuracy_percent", *values) for values in zip(*found, strict=True)]
    left.set_xlabel("optimizer steps")
    left.set_ylabel("rise of the batch's loss by\nthe ascent step (nats)")
    right.set_xlabel("epochs done")
    right.set_ylabel("validation accuracy (%)")
    for axis in (left, right):
        axis.set_title(setting(next(iter(groups.values()))[0]))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawn(figure, ("case", "quantity", "step_or_epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
