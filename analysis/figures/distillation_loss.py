"""Terms of the loss under distillation: ``python -m analysis.figures.distillation_loss runs=GLOB``.

Every term as it is in the loss, at the logged steps. Bands: range over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.collect import Row
from analysis.figures.base import Drawn, by_label, comparable, curve, figure_script, panels, plot_curve, styles
from analysis.labels import method_name, setting

SLUG = "distillation"
TERMS = {"loss": "loss", "task": "task (labels)", SLUG: "distillation (soft targets)", "features": "features"}


def distilled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs of distillation alone at one setting, and of the same quantizer without it, by name of the method."""
    own = comparable(rows, f"callbacks=[{SLUG}]", lambda row: row["mechanics"] == [SLUG])
    names = (method_name({**own[0], "mechanics": []}), method_name(own[0]))
    alike = [row for row in rows if setting(row) == setting(own[0]) and method_name(row) in names]
    return by_label(alike, method_name, names)


def draw(rows: Sequence[Row]) -> Drawn:
    """A line per term."""
    (name, group) = list(distilled(rows).items())[-1]
    curves = {term: curve(group, f"train/step/{term}", steps=True) for term in TERMS}
    logged = {term: found for term, found in curves.items() if found.x}
    figure, (axis,) = panels(1, 1, width=4.2)
    look, table = styles(logged), []
    for term, found in logged.items():
        plot_curve(axis, found, look[term], TERMS[term])
        table += [(term, *values) for values in zip(*found, strict=True)]
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("training loss of a batch")
    axis.set_title(f"{name}\n{setting(group[0])}")
    axis.legend()
    return Drawn(figure, ("term", "step", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
