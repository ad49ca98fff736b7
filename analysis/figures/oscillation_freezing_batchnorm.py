"""Accuracy before and after batch-norm re-estimation: ``python -m analysis.figures.oscillation_freezing_batchnorm``.

Of LSQ alone, with dampening and with freezing, the finalised network with the running averages of training and with
statistics estimated anew: from the summaries of runs with ``finalise.batchnorm_batches``, else from ``python -m
analysis.batchnorm``. Rings: seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, figure_script, panels, styles
from analysis.figures.beside import with_and_without
from analysis.figures.oscillation_tracker_fraction import ORDER
from analysis.labels import setting

SLUGS = ("oscillation_dampening", "oscillation_freezing")
FORMS = ("running averages", "re-estimated")


def before_and_after(row: Row) -> tuple[float, float] | None:
    """Test accuracies in percent, None where they are not known."""
    if row.get("accuracy_before_batchnorm") is not None:
        return 100 * row["accuracy_before_batchnorm"], 100 * row["accuracy"]
    kept = [
        record["values"]
        for record in row["run"].measurements
        if record["kind"] == "batchnorm" and record["settings"]["deployment"] == row["name"]
    ]
    return (100 * kept[-1]["before"], 100 * kept[-1]["after"]) if kept else None


def draw(rows: Sequence[Row]) -> Drawn:
    """Two marks per method, side by side."""
    groups = with_and_without(rows, SLUGS[1])
    others = with_and_without(rows, SLUGS[0])
    if setting(next(iter(others.values()))[0]) == setting(next(iter(groups.values()))[0]):
        groups = others | groups
    values = {
        name: {row["seed"]: pair for row in groups[name] if (pair := before_and_after(row)) is not None}
        for name in sorted(groups, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    }
    values = {name: pairs for name, pairs in values.items() if pairs}
    if not values:
        raise NoData(f"no measurement of {', '.join(groups)}: python -m analysis.batchnorm runs=...")
    figure, (axis,) = panels(1, 1, width=4.6, height=3.0)
    look = styles(FORMS)
    table: list[tuple[Any, ...]] = []
    for place, (name, pairs) in enumerate(values.items()):
        for index, form in enumerate(FORMS):
            at, seeds = place + 0.24 * index - 0.12, [pair[index] for pair in pairs.values()]
            mark = {**look[form], "linestyle": "none", "markersize": 7}
            axis.plot(at, mean(seeds), **mark, label=None if place else form)
            axis.plot([at + 0.07] * len(seeds), seeds, "o", color="black", markersize=3, markerfacecolor="white")
            table += [(name, form, *pair) for pair in zip(pairs, seeds, strict=True)]
    axis.set_xticks(range(len(values)), [name.replace(" + ", " +\n") for name in values])
    axis.set_xlim(-0.5, len(values) - 0.5)
    axis.set_xlabel("method")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(setting(next(iter(groups.values()))[0]))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, title="batch-norm statistics")
    return Drawn(figure, ("method", "batchnorm", "seed", "accuracy_percent"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
