"""Effects of what varies: ``python -m analysis.ablation runs=GLOB [factors=KEY,KEY] [metric=accuracy] [output=DIR]``.

``ablation_effects``: for each factor the mean of the metric at each level, with the standard deviation over everything
else that varies (seeds, other factors), and every run as a dot. ``ablation_interactions``: for each pair of factors,
the levels of one over the levels of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cli import REQUIRED, script
from analysis.collect import collect
from analysis.columns import columns, split_names
from analysis.factors import (
    Factor,
    Level,
    balanced,
    effect,
    find_factors,
    interaction,
    named_factors,
    numbers,
    size,
)
from analysis.figures.base import LINES, Drawn, panels, save, styles
from analysis.rows import Row

ACROSS = 3
MOST = 12
PAIRED = 4
"""Without ``factors=``: so many panels of effects, and pairs of so many factors, those of the largest effects."""
LONGEST = 18


class Ablation(NamedTuple):
    """What an ablation found.

    Attributes:
        metric: title of the number, with its unit.
        factors: what is drawn, the largest effect first where none was named.
        left_out: factors that vary and are not drawn.
        effects: levels of each factor.
        fair: for each factor, whether its levels have the same runs in everything else.
        values: the number of each row.
    """

    metric: str
    factors: list[Factor]
    left_out: list[Factor]
    effects: list[list[Level]]
    fair: list[bool]
    values: list[float]


def analyse(rows: Sequence[Row], keys: Sequence[str] = (), metric: str = "accuracy") -> Ablation:
    """Main effects of the named factors, or of all that vary.

    Args:
        rows: deployments as ``collect`` gives them.
        keys: configuration keys, or ``mechanics``.
        metric: any column that is a number.

    Raises:
        ValueError: an unknown key or metric, a key that does not vary, or nothing that varies.
    """
    (column,) = columns((metric,), rows)
    known, values = numbers(rows, column)
    every = find_factors(known)
    chosen = named_factors(known, keys) if keys else every
    if not chosen:
        raise ValueError("factors=: nothing but the seed varies between these runs; give runs= of a sweep")
    if not keys:
        chosen = sorted(chosen, key=lambda one: -size(effect(one, values)))
    drawn = chosen if keys else chosen[:MOST]
    return Ablation(
        metric=column.title,
        factors=drawn,
        left_out=chosen[len(drawn) :],
        effects=[effect(one, values) for one in drawn],
        fair=[balanced(one, every, known) for one in drawn],
        values=values,
    )


def pairs(found: Ablation) -> list[tuple[Factor, Factor]]:
    """The pairs of factors to draw, the one with more levels along the axis, the other as lines."""
    few = [one for one in found.factors if len(one.levels) <= MOST][:PAIRED]
    ordered = [tuple(sorted(pair, key=lambda one: -len(one.levels))) for pair in combinations(few, 2)]
    return [(first, second) for first, second in ordered if len(second.levels) <= len(LINES)]


def draw_effects(found: Ablation) -> Drawn:
    """One panel for each factor; means of numeric levels are joined."""
    figure, axes = _grid(len(found.factors))
    table = []
    for axis, factor, levels, fair in zip(axes, found.factors, found.effects, found.fair, strict=True):
        for place, level in enumerate(levels):
            dots = axis.plot([place - 0.15] * len(level.values), level.values, "o", color="0.6", markersize=2.5)
        means = axis.errorbar(
            range(len(levels)),
            [level.mean for level in levels],
            [level.deviation or 0.0 for level in levels],
            color="black", marker="s", markersize=5, linestyle="-" if factor.numeric else "none", linewidth=1,
            elinewidth=1, capsize=3,
        )  # fmt: skip
        _levels(axis, factor)
        axis.set_ylabel(found.metric)
        axis.set_title(factor.key if fair else f"{factor.key}\n(unbalanced: levels differ in more than this)")
        table += [(factor.key, *level.levels, level.mean, _blank(level.deviation), len(level.values), fair)
                  for level in levels]  # fmt: skip
    labels = ("one run", "mean ± standard deviation over all else")
    figure.legend([dots[0], means], labels, loc="outside lower center", ncols=2)
    return Drawn(figure, ("factor", "level", f"mean {found.metric}", "standard deviation", "n", "balanced"), table)


def draw_interactions(found: Ablation, drawn: Sequence[tuple[Factor, Factor]]) -> Drawn:
    """One panel for each of the pairs of factors."""
    figure, axes = _grid(len(drawn))
    table = []
    for axis, (first, second) in zip(axes, drawn, strict=True):
        looks = styles(second.levels)
        for number, name in enumerate(second.levels):
            line = [level for level in interaction(first, second, found.values) if level.levels[1] == name]
            shift = 0.08 * (number - (len(second.levels) - 1) / 2)
            axis.errorbar(
                [first.levels.index(level.levels[0]) + shift for level in line],
                [level.mean for level in line],
                [level.deviation or 0.0 for level in line],
                capsize=2, label=_short(name), **looks[name],
            )  # fmt: skip
            table += [(first.key, level.levels[0], second.key, name, level.mean, _blank(level.deviation),
                       len(level.values)) for level in line]  # fmt: skip
        _levels(axis, first)
        axis.set_xlabel(first.key)
        axis.set_ylabel(found.metric)
        axis.legend(title=second.key, fontsize="small", title_fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    header = ("factor", "level", "by", "its level", f"mean {found.metric}", "standard deviation", "n")
    return Drawn(figure, header, table)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Panels for a count of axes, those that are too many taken away."""
    across = min(ACROSS, count)
    figure, axes = panels(ceil(count / across), across)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _levels(axis: Axes, factor: Factor) -> None:
    """The levels of a factor along the x axis, slanted where they are long, and not all of them where they are many."""
    step = ceil(len(factor.levels) / MOST)
    places = range(0, len(factor.levels), step)
    names = [_short(factor.levels[place]) for place in places]
    slanted = sum(map(len, names)) > 30
    axis.set_xticks(places, names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axis.set_xlim(-0.5, len(factor.levels) - 0.5)


def _short(level: str) -> str:
    """A level for an axis: numbers in six digits, the last part of a dotted path, the middle cut where it is long."""
    try:
        return f"{float(level):g}"
    except ValueError:
        last = level.rpartition(".")[2] if level.count(".") > 1 else level
        return last if len(last) <= LONGEST else f"{last[: LONGEST // 2]}…{last[1 - LONGEST // 2 :]}"


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def main(runs: str, factors: str | None, metric: str, output: str) -> None:
    """Draw effects and interactions, and say what was left out.

    Args:
        runs: run folders or another source, see ``analysis.sources``.
        factors: configuration keys or ``mechanics``, separated by commas; all that vary where None.
        metric: any numeric column, see ``analysis.columns``.
        output: folder for ``ablation_effects`` and ``ablation_interactions`` as PDF, PNG and CSV.
    """
    rows = collect(runs)
    found = analyse(rows, split_names(factors), metric)
    if len(found.values) < len(rows):
        print(f"{len(rows) - len(found.values)} of {len(rows)} rows have no {metric}: left out")
    for factor in found.factors:
        if factor.same:
            print(f"{factor.key} varies together with {', '.join(factor.same)}: one factor")
    if found.left_out:
        print(f"not drawn: {', '.join(factor.key for factor in found.left_out)}; name them with factors=")
    paths = [save(draw_effects(found), Path(output), "ablation_effects")[0]]
    if pairs(found):
        paths.append(save(draw_interactions(found, pairs(found)), Path(output), "ablation_interactions")[0])
    elif len(found.factors) > 1:
        print(f"no interactions: they need two factors of {MOST} and {len(LINES)} levels at most")
    print(f"wrote {' and '.join(map(str, paths))}, each also as .png and .csv")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "factors": None, "metric": "accuracy", "output": "figures"})
