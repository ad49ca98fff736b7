"""Training curves of many configurations: a chart for each metric, the best configurations told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.base import LINES, panels, styles
from analysis.rows import Row

FIRST = ("val/accuracy", "val/loss", "train/accuracy", "train/loss")
WITHIN_EPOCH = "train/step/"
CHARTS = 12


class Line(NamedTuple):
    """A metric of one configuration: mean and range over its seeds at each place."""

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Chart(NamedTuple):
    """A metric of all configurations that logged it.

    Attributes:
        metric: its name.
        unit: what ``x`` counts.
        lines: by position of the configuration.
    """

    metric: str
    unit: str
    lines: dict[int, Line]


class Curves(NamedTuple):
    """Charts, and the names of metrics that have none."""

    charts: list[Chart]
    left_out: list[str]


def curves(groups: Sequence[Sequence[Row]], names: Sequence[str] = ()) -> Curves:
    """Charts of the named metrics, or of up to twelve: losses and accuracies first, none of single steps.

    Args:
        groups: runs of one configuration each.
        names: metrics of ``metrics.csv``.

    Raises:
        ValueError: no run logged a named metric.
    """
    logged: dict[str, dict[int, dict[tuple[int, int | None], list[float]]]] = {}
    for position, group in enumerate(groups):
        for run in {id(row["run"]): row["run"] for row in group}.values():
            for step, epoch, name, value in run.history():
                places = logged.setdefault(name, {}).setdefault(position, {})
                places.setdefault((step, epoch), []).append(value)
    for name in names:
        if name not in logged:
            raise ValueError(f"curves={name}: no run logged it; use one of {', '.join(sorted(logged))}")
    whole = sorted(
        (name for name in logged if not name.startswith(WITHIN_EPOCH)),
        key=lambda n: (*(n != first for first in FIRST), n),
    )
    drawn = list(names) or whole[:CHARTS]
    return Curves([chart(name, logged[name]) for name in drawn], sorted(logged.keys() - set(drawn)))


def chart(metric: str, logged: Mapping[int, Mapping[tuple[int, int | None], Sequence[float]]]) -> Chart:
    """A chart over epochs where every configuration logged the metric once in an epoch, else over optimizer steps.

    Args:
        metric: name of the metric.
        logged: values over seeds by (step, epoch), by position of the configuration.
    """
    by_epoch = all(
        None not in epochs and len(set(epochs)) == len(epochs)
        for epochs in ([epoch for _, epoch in places] for places in logged.values())
    )
    lines = {}
    for position, places in logged.items():
        at = {(epoch if by_epoch else step) + 1: values for (step, epoch), values in sorted(places.items())}  # type: ignore[operator]
        values = list(at.values())
        lines[position] = Line(list(at), [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values])
    return Chart(metric, "epochs done" if by_epoch else "optimizer steps done", lines)


def draw(found: Chart, ranked: Sequence[int]) -> Figure:
    """Seven configurations in styles of their own, the others in grey behind them.

    Args:
        found: the chart.
        ranked: positions of the configurations, the best first; a label is the position counted from 1.
    """
    told = [position for position in ranked if position in found.lines][: len(LINES)]
    looks = styles(str(position) for position in sorted(told))
    figure, (axis,) = panels(1, 1, 4.4, 3.0)
    for position in sorted(told):
        line, look = found.lines[position], looks[str(position)]
        axis.plot(line.x, line.mean, label=str(position + 1), **look | {"markevery": max(1, len(line.x) // 12)})
        axis.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
    others = [line for position, line in found.lines.items() if position not in told]
    for number, line in enumerate(others):
        behind = {"color": "0.7", "linewidth": 0.6, "zorder": 1, "label": None if number else "others"}
        axis.plot(line.x, line.mean, **behind)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(found.unit)
    axis.set_ylabel(found.metric)
    figure.legend(loc="outside lower center", ncols=8, fontsize="small", handlelength=2.6, columnspacing=1)
    return figure
