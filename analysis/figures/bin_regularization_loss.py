"""Bin regularization over training: ``python -m analysis.figures.bin_regularization_loss runs=GLOB``.

Left: the term as it is in the loss. Right: validation accuracy. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, curve, figure_script, panels, plot_curve, styles
from analysis.figures.bin_regularization_weights import SLUG, regularised
from analysis.labels import setting


def draw(rows: Sequence[Row]) -> Drawn:
    """Loss term over steps and accuracy over epochs, by strength."""
    groups = regularised(rows)
    figure, (left, right) = panels(1, 2)
    look, table = styles(groups), []
    for name, group in groups.items():
        term, accuracy = curve(group, f"train/step/{SLUG}", steps=True), curve(group, "val/accuracy", 100)
        if term.x:
            plot_curve(left, term, look[name], name)
        plot_curve(right, accuracy, look[name], name)
        table += [(name, "term", *values) for values in zip(*term, strict=True)]
        table += [(name, "val_accuracy_percent", *values) for values in zip(*accuracy, strict=True)]
    left.set_xlabel("optimizer steps")
    left.set_ylabel("term of the loss\n(λ × sum over layers and bins)")
    right.set_xlabel("epochs done")
    right.set_ylabel("validation accuracy (%)")
    for axis in (left, right):
        axis.set_title(setting(next(iter(groups.values()))[0]))
    left.set_ylim(bottom=0)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return Drawn(figure, ("strength", "quantity", "step_or_epoch", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
