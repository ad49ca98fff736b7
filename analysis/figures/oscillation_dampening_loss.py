"""Dampening over training: ``python -m analysis.figures.oscillation_dampening_loss runs=GLOB``.

Left: its term as it is in the loss, of the last batch of every epoch. Right: validation accuracy, beside training
without it. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, option, panels, plot_curve, styles
from analysis.figures.beside import with_and_without
from analysis.labels import setting

SLUG = "oscillation_dampening"


def draw(rows: Sequence[Row]) -> Drawn:
    """The term over steps and accuracy over epochs."""
    groups = with_and_without(rows, SLUG)
    figure, (left, right) = panels(1, 2)
    look = styles(groups)
    table: list[tuple[Any, ...]] = []
    for name, group in groups.items():
        term = curve(group, f"train/step/{SLUG}", steps=True)
        if term.x:
            plot_curve(left, term, look[name], name)
        found = curve(group, "val/accuracy", 100)
        plot_curve(right, found, look[name], name)
        table += [(name, "term", *values) for values in zip(*term, strict=True)]
        table += [(name, "val_accuracy_percent", *values) for values in zip(*found, strict=True)]
    own = next(row for group in groups.values() for row in group if SLUG in row["mechanics"])
    left.set_xlabel("optimizer steps")
    left.set_ylabel("term of the loss (λ × squared\ndistance to the levels)")
    left.set_ylim(bottom=0)
    left.set_title(f"{setting(own)},\nλ up to {option(own, SLUG, 'strength'):g}")
    right.set_xlabel("epochs done")
    right.set_ylabel("validation accuracy (%)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return Drawn(figure, ("method", "quantity", "step_or_epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
