"""How an SSPS search settles: ``python -m analysis.figures.ssps_certainty runs=GLOB``.

Left: certainty of every searched tensor, a dot where it is fixed. Middle: the entropy that is left, summed over
tensors. Right: the expected cost as a part of the budget. Of the first run with SSPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, history, panels
from analysis.figures.layers import WEIGHT, heading, logged, plot_layers, table_of

SLUG = "ssps"
FURTHER = {"entropy": "entropy of all tensors (nats)", "expected_cost/0": "expected cost / budget"}


def draw(rows: Sequence[Row]) -> Drawn:
    """Certainty by layer, entropy and expected cost."""
    row, certainties = logged(rows, f"{SLUG}/certainty/", WEIGHT)
    figure, (left, *others) = panels(1, 3, width=4.2)
    plot_layers(left, certainties)
    for values in certainties.values():
        fixed = next(((step, value) for step, value in values if value == 1), None)
        if fixed is not None:
            left.plot(*fixed, "ko", markersize=3)
    left.set_ylabel("certainty")
    left.set_title(heading(row))
    table: list[tuple[Any, ...]] = list(table_of(certainties, "certainty"))
    for axis, (name, title) in zip(others, FURTHER.items(), strict=True):
        values = [(step, value) for step, _, value in history(row, f"{SLUG}/{name}")]
        axis.plot(*zip(*values, strict=True), color="black", marker=".")
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(title)
        table += [(name, "", step, value) for step, value in values]
    others[-1].axhline(1.0, color="0.5", linewidth=0.8)
    return Drawn(figure, ("quantity", "layer", "step", "value"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
