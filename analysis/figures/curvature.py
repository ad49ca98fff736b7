"""What figures of curvature share: bars of the greatest eigenvalue and of the trace, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from analysis.collect import Row
from analysis.figures.base import Drawn, panels
from analysis.figures.flatness import curvature_values, kept, plot_estimates

LABELS = {"top_eigenvalue": "greatest eigenvalue of the\n{} (nats / unit²)", "trace": "trace of the {}\n(nats / unit²)"}
OPERATORS = {"hessian": "Hessian", "ggn": "GGN", "fisher": "empirical Fisher"}


def draw_curvature(groups: Mapping[str, Sequence[Row]], title: str) -> Drawn:
    """Two panels of bars over the names.

    Args:
        groups: runs by name, of one setting.
        title: what the runs share.

    Raises:
        NoData: no run has the measurement.
    """
    found = kept(groups, "curvature", ("seed",), surface="quantized")
    settings = next(iter(found.values()))[0][0]["settings"]
    figure, axes = panels(1, 2, height=3.0)
    table: list[tuple[Any, ...]] = []
    converged = True
    for axis, (quantity, values) in zip(axes, curvature_values(found).items(), strict=True):
        plot_estimates(axis, values, LABELS[quantity].format(OPERATORS[settings["operator"]]))
        axis.set_title(f"{title}\n{settings['images']} training images")
        axis.set_xticks(range(len(values)), [name.replace(" ", "\n", 1) for name in values])
        table += [(name, quantity, *entry) for name, entries in values.items() for entry in entries]
        converged = converged and all(entry[2] for entries in values.values() for entry in entries)
    if not converged:
        cross = Line2D(
            [], [], marker="X", linestyle="none", color="black", markerfacecolor="white", label="not converged"
        )
        figure.legend(handles=[cross], loc="outside lower center")
    return Drawn(figure, ("method", "quantity", "value", "residual_or_standard_error", "converged"), table)
