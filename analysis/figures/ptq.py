"""What figures of post-training quantization share: float runs by method, and their accuracy over bits.

Records of ``python -m research.evaluate run=DIR ptq=[...]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, by_label, comparable, panels, plot_curve, styles
from analysis.figures.kurtosis_ptq import ptq_curve
from analysis.labels import method_name, setting


def float_runs(rows: Sequence[Row], slug: str, methods: Sequence[str]) -> dict[str, list[Row]]:
    """Float runs of the last of ``methods`` and, at the same setting, of the others, by method.

    Raises:
        NoData: no run of the last of ``methods``, that of ``callbacks=[slug]``.
    """
    own = comparable(rows, f"quantizer=float callbacks=[{slug}]", lambda row: method_name(row) == methods[-1])
    alike = [row for row in rows if setting(row) == setting(own[0]) and method_name(row) in methods]
    return by_label(alike, method_name, methods)


def draw_ptq(groups: Mapping[str, Sequence[Row]], methods: Sequence[str]) -> Drawn:
    """Accuracy over bits of the weights: a line per method with its range over seeds, ``float`` at the left.

    Args:
        groups: float runs by method, of one setting.
        methods: in the order of their styles; the last one must have records.

    Raises:
        NoData: it has none.
    """
    curves = {name: found for name, group in groups.items() if (found := ptq_curve(group)).x}
    if methods[-1] not in curves:
        raise NoData(f"no run of {methods[-1]} with a record of research.evaluate ptq=[...]")
    widths = sorted({bits for found in curves.values() for bits in found.x})
    figure, (axis,) = panels(1, 1, width=4.4, height=3.0)
    look = styles(methods)
    table: list[tuple[Any, ...]] = []
    for name, found in curves.items():
        plot_curve(axis, found, look[name], name)
        seeds = [100 * row["accuracy"] for row in groups[name]]
        place = widths[-1] + 1 + 0.15 * list(curves).index(name)
        axis.plot(place, mean(seeds), **look[name])
        table += [(name, bits, *values) for bits, *values in zip(*found, strict=True)]
        table.append((name, 32, mean(seeds), min(seeds), max(seeds)))
    middle = widths[-1] + 1 + 0.075 * (len(curves) - 1)
    axis.set_xticks([*widths, middle], [*(f"{bits:g}" for bits in widths), "float"])
    axis.invert_xaxis()
    axis.set_xlabel("bits of the weights, min-max range per tensor")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(setting(next(iter(groups.values()))[0]))
    axis.legend(loc="lower left")
    return Drawn(figure, ("method", "bits", "mean", "low", "high"), table)
