"""Cost over a search: ``python -m analysis.figures.search_cost runs=GLOB [kind=size]``.

What the present widths cost as a part of the budget (``cost/<kind>``, as every search with a budget logs it), a line
for each method and budget; bands: range over seeds. Runs of the network and data that most of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.figures.base import Drawn, NoData, by_label, curve, figure_script, panels, plot_curve, styles
from analysis.labels import method_name
from research.quant.budget import budgets_from_config


def budget_of(row: Row, kind: str) -> float | None:
    """The least budget of a kind that a run had; None where it had none."""
    given = [
        settings[key]
        for settings in row["config"]["callbacks"].values()
        for key in ("budget", "input_budget")
        if settings.get(key)
    ]
    budgets = [budget for config in given for budget in budgets_from_config(config)]
    return min((float(budget.value) for budget in budgets if budget.kind == kind), default=None)


def draw(rows: Sequence[Row], kind: str = "average_bits") -> Drawn:
    """The costs of all searches of one network.

    Args:
        rows: of runs.
        kind: of the budget.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if f"cost/{kind}" in row["metrics"] and budget_of(row, kind) is not None:
            groups.setdefault(f"{row['model']}, {row['data']}", []).append(row)
    if not groups:
        raise NoData(f"no run of a search with a budget of {kind} that logged its cost")
    title, chosen = max(groups.items(), key=lambda group: len(group[1]))
    searches = by_label(chosen, lambda row: f"{method_name(row)}, {budget_of(row, kind):g}")
    figure, (axis,) = panels(1, 1, width=5.2, height=3.4)
    table: list[tuple[Any, ...]] = []
    for name, look in styles(searches).items():
        budget = budget_of(searches[name][0], kind)
        assert budget is not None
        found = curve(searches[name], f"cost/{kind}", 1 / budget, steps=True)
        plot_curve(axis, found, look, name)
        table += [(name, *values) for values in zip(*found, strict=True)]
    axis.axhline(1.0, color="0.5", linewidth=0.8)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(f"{kind} / budget")
    axis.set_title(title)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Drawn(figure, ("method", "step", "mean", "low", "high"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
