"""What figures of flatness share: kept measurements by method, and the panels of sharpness, slices and curvature."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.collect import Row
from analysis.figures.base import Curve, NoData, Style, plain, plot_curve
from analysis.sharpness import FORM_WORDS, UNITS
from research.runs.measurements import Measurement

Kept = dict[str, list[list[Measurement]]]
"""By name, for each run the measurements of one kind."""


def kept(groups: Mapping[str, Sequence[Row]], kind: str, free: Sequence[str] = (), **wanted: Any) -> Kept:
    """Measurements of runs by name, of those settings that most names and most runs share.

    Args:
        groups: runs by name, one for each seed.
        kind: of the measurement.
        free: settings that may differ, such as ``rho``; a run's measurements are ordered by them.
        wanted: settings that must have a given value, such as ``dimensions=1``.

    Raises:
        NoData: no run has such a measurement.
    """
    by_settings: dict[str, Kept] = {}
    for name, rows in groups.items():
        for row in rows:
            own: dict[str, list[Measurement]] = {}
            for record in row["run"].measurements:
                settings = record["settings"]
                given = {key: settings.get(key) for key in wanted}
                own_network = settings.get("deployment", row["name"]) == row["name"]
                if record["kind"] == kind and own_network and given == wanted:
                    fixed = {key: value for key, value in settings.items() if key not in free}
                    own.setdefault(json.dumps(fixed, sort_keys=True), []).append(record)
            for key, records in own.items():
                records.sort(key=lambda record: [record["settings"][name] for name in free])
                by_settings.setdefault(key, {}).setdefault(name, []).append(records)
    if not by_settings:
        raise NoData(f"no measurement of {', '.join(groups)}: python -m analysis.{kind} runs=...")
    return max(by_settings.values(), key=lambda found: (len(found), sum(map(len, found.values()))))


def spread(points: Sequence[Mapping[float, float]]) -> Curve:
    """Mean and range of several seeds' values by position."""
    x = sorted({place for seed in points for place in seed})
    values = [[seed[place] for seed in points if place in seed] for place in x]
    return Curve(x, [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def plot_sharpness(axis: Axes, found: Kept, look: Mapping[str, Style]) -> list[tuple[Any, ...]]:
    """Rise of the loss against the radius of the ball; rows of name, rho, mean, low and high."""
    table: list[tuple[Any, ...]] = []
    for name, seeds in found.items():
        over = spread([{r["settings"]["rho"]: r["values"]["rise"] for r in records} for records in seeds])
        plot_curve(axis, over, look[name], name)
        table += [(name, *values) for values in zip(*over, strict=True)]
    settings = next(iter(found.values()))[0][0]["settings"]
    if all(row[3] > 0 for row in table):
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(f"radius ρ ({UNITS[settings['norm']]})")
    axis.set_ylabel(f"{FORM_WORDS[settings['form']]} of the\ntraining loss (nats)")
    return table


def plot_slices(axis: Axes, found: Kept, look: Mapping[str, Style]) -> list[tuple[Any, ...]]:
    """Loss along a random direction; rows of name, position, mean, low and high."""
    table: list[tuple[Any, ...]] = []
    for name, seeds in found.items():
        slices = [dict(zip(r["values"]["positions"], r["values"]["losses"], strict=True)) for (r,) in seeds]
        over = spread(slices)
        plot_curve(axis, over, plain(look[name]), name)
        table += [(name, *values) for values in zip(*over, strict=True)]
    axis.axvline(0, color="0.6", linewidth=0.6, linestyle=":")
    axis.set_xlabel("position along the direction\n(norms of each filter)")
    axis.set_ylabel("training loss (nats)")
    return table


def plot_estimates(axis: Axes, values: Mapping[str, Sequence[tuple[float, float, bool]]], label: str) -> None:
    """A bar for each name's mean, every estimate as a ring with its error; a cross where it has not converged.

    Args:
        axis: the panel.
        values: by name, ``(value, error, converged)`` of every run.
        label: of the values, with their unit.
    """
    for place, (name, entries) in enumerate(values.items()):
        axis.bar(place, mean(value for value, _, _ in entries), 0.6, color="0.85", edgecolor="0.3", linewidth=0.8)
        for index, (value, error, converged) in enumerate(entries):
            at = place + 0.12 * (index - (len(entries) - 1) / 2)
            axis.errorbar(
                at, value, error, fmt="o" if converged else "X", color="black", markerfacecolor="white", capsize=2,
                label=f"_{name}",
            )  # fmt: skip
    axis.set_xticks(range(len(values)), list(values))
    axis.set_xlabel("method")
    axis.set_ylabel(label)


def curvature_values(found: Kept) -> dict[str, dict[str, list[tuple[float, float, bool]]]]:
    """By quantity (``top_eigenvalue``, ``trace``) and name, ``(value, error, converged)`` of every measurement.

    The error of an eigenvalue is its residual, that of a trace its standard error.
    """
    tops: dict[str, list[tuple[float, float, bool]]] = {}
    traces: dict[str, list[tuple[float, float, bool]]] = {}
    for name, runs in found.items():
        for record in (record for records in runs for record in records):
            top, trace = record["values"]["eigenvalues"][0], record["values"]["trace"]
            tops.setdefault(name, []).append((top["value"], top["residual"], top["converged"]))
            traces.setdefault(name, []).append((trace["value"], trace["standard_error"], True))
    return {"top_eigenvalue": tops, "trace": traces}
