"""Accuracy against cost: ``python -m analysis.figures.allocation_pareto runs=GLOB [costs=bops,size_kib]``.

One panel for each cost. A method is a line through its networks in order of cost (mean over seeds, bars: range); the
networks of uniform width are the baseline, and what no other network beats in both is ringed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from statistics import mean
from typing import Any

from analysis.collect import Row
from analysis.figures.allocation_bits import allocation_of, chosen_by, name_of
from analysis.figures.base import COLOURS, LINES, MARKERS, Drawn, by_label, comparable, figure_script, panels

COSTS: dict[str, tuple[str, float]] = {
    "bops": ("bit operations (10⁹)", 1e-9),
    "size_kib": ("weights (KiB)", 1.0),
    "weight_bits": ("bits of a weight on average", 1.0),
    "activation_max_bits": ("largest activation (KiB)", 1 / 8192),
}
"""Column of a run to the axis' label and the factor to its unit."""

Point = tuple[str, float, list[float]]
"""Network, its cost, accuracy of every seed in percent."""


def dominated(point: Point, others: Sequence[Point]) -> bool:
    """Whether another network costs no more and is no less accurate on average, and better in one of the two."""
    cost, accuracy = point[1], mean(point[2])
    return any(
        other[1] <= cost and mean(other[2]) >= accuracy and (other[1] < cost or mean(other[2]) > accuracy)
        for other in others
    )


def trained(row: Row) -> Callable[[Row], bool]:
    """Runs of one network, data set and length as ``row``, of whatever widths."""
    return lambda other: all(other[key] == row[key] for key in ("model", "data", "epochs"))


def series(rows: Sequence[Row], cost: str) -> dict[str, list[Point]]:
    """Networks by method, in order of cost; those of uniform width first.

    Raises:
        NoData: no quantized run.
        ValueError: a run does not know its ``cost``.
    """
    quantized = [row for row in rows if allocation_of(row) is not None]
    start = comparable(quantized, "quantizers and a table.yaml", lambda row: True)[0]
    chosen = list(filter(trained(start), quantized))
    found: dict[str, list[Point]] = {}
    for called, seeds in by_label(chosen, _network).items():
        if seeds[0].get(cost) is None:
            raise ValueError(f"costs={cost}: {called} has no such column; use some of {', '.join(COSTS)}")
        scale = COSTS[cost][1]
        point = (called, mean(float(row[cost]) for row in seeds) * scale, [100 * row["accuracy"] for row in seeds])
        found.setdefault(called.rpartition(", ")[0], []).append(point)
    order = sorted(found, key=lambda name: any("mixed" in point[0] for point in found[name]))
    return {name: sorted(found[name], key=lambda point: point[1]) for name in order}


def _network(row: Row) -> str:
    allocation = allocation_of(row)
    assert allocation is not None
    return f"{chosen_by(row)}, {name_of(allocation)}"


def draw(rows: Sequence[Row], costs: str = "bops,size_kib") -> Drawn:
    """Test accuracy over each cost."""
    names = [cost.strip() for cost in costs.split(",")]
    for cost in names:
        if cost not in COSTS:
            raise ValueError(f"costs={cost}: use some of {', '.join(COSTS)}")
    found = [series(rows, cost) for cost in names]
    figure, axes = panels(1, len(names), width=4.2, height=2.8 + 0.18 * ceil(len(found[0]) / 4))
    table: list[tuple[Any, ...]] = []
    for axis, cost, methods in zip(axes, names, found, strict=True):
        every = [point for points in methods.values() for point in points]
        for place, (name, points) in enumerate(methods.items()):
            turn, kind = divmod(place, len(COLOURS))  # every turn pairs the colours with other markers
            look = {"color": COLOURS[kind], "linestyle": LINES[kind], "marker": MARKERS[(kind + turn) % len(MARKERS)]}
            x, y = [point[1] for point in points], [mean(point[2]) for point in points]
            low, high = [min(point[2]) for point in points], [max(point[2]) for point in points]
            axis.plot(x, y, label=name, **look)
            axis.vlines(x, low, high, color=look["color"], linewidth=0.8)
            for point in points:
                best = not dominated(point, every)
                if best:
                    axis.plot(point[1], mean(point[2]), "o", markersize=11, markerfacecolor="none", color="0.4")
                table.append((point[0], cost, point[1], mean(point[2]), len(point[2]), best))
        axis.set_xlabel(COSTS[cost][0])
        axis.set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawn(figure, ("network", "cost", "value", "accuracy_percent", "seeds", "not_dominated"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
