"""One page for a sweep: ``python -m analysis.report runs=GLOB [output=report.html] [baseline=NAME] [columns=NAME]``.

A single HTML file without any outside reference: result table, training curves, effects of what varies, measurements,
configurations and environments.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.pyplot as plt
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from analysis.ablation import Ablation, analyse, draw_effects, draw_interactions, pairs
from analysis.cells import Cell, cell
from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from analysis.columns import STANDARD, columns, split_names
from analysis.comparison import WITHIN
from analysis.factors import MECHANICS, find_factors
from analysis.formats import Table
from analysis.measured_tables import measured_tables
from analysis.tables import command_line, grouped, result_table
from analysis.training_curves import curves, draw
from research.runs.files import atomic_write_text

TEMPLATE = Path(__file__).parent / "report.html.j2"
MOST_SETTINGS = 6
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Picture(NamedTuple):
    """A figure in the page: its address, which is the picture itself, and what it shows in words."""

    source: str
    words: str


def picture(figure: Figure, words: str) -> Picture:
    """A figure as an SVG data address; letters are outlines, so that it looks the same everywhere."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "flatbit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return Picture("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), words)


def ranking(groups: Sequence[Sequence[Row]], metric: str) -> list[int]:
    """Positions of the groups, the greatest mean of a metric first."""
    (column,) = columns((metric,), [row for group in groups for row in group])
    means = [cell(group, column).mean for group in groups]
    return sorted(range(len(groups)), key=lambda p: (means[p] is None, -(means[p] or 0.0)))


def curve_pictures(
    groups: Sequence[Sequence[Row]], names: Sequence[str], metric: str
) -> tuple[list[Picture], list[str]]:
    """Training curves as pictures, and the metrics that have none."""
    found, ranked = curves(groups, names), ranking(groups, metric)
    pictures = []
    for chart in found.charts:
        best = [position for position in ranked if position in chart.lines][:3]
        last = ", ".join(f"{chart.lines[p].mean[-1]:.4g} in line {p + 1}" for p in best)
        words = f"{chart.metric} against {chart.unit}, {len(chart.lines)} configurations; last values: {last}"
        pictures.append(picture(draw(chart, ranked), words))
    return pictures, found.left_out


def ablation_pictures(found: Ablation) -> list[Picture]:
    """The effect of each factor, then each pair of factors, as pictures of their own; the words carry the means."""
    pictures = []
    for place, (factor, levels) in enumerate(zip(found.factors, found.effects, strict=True)):
        alone = found._replace(factors=[factor], effects=[levels], fair=found.fair[place : place + 1])
        means = ", ".join(f"{level.mean:.4g} at {level.levels[0]}" for level in levels)
        pictures.append(picture(draw_effects(alone).figure, f"Mean {found.metric} by {factor.key}: {means}"))
    for pair in pairs(found):
        words = f"Mean {found.metric} by {pair[0].key}, a line for each {pair[1].key}"
        pictures.append(picture(draw_interactions(found, [pair]).figure, words))
    return pictures


def told_apart(rows: Sequence[Row]) -> list[str]:
    """The standard columns, with those settings behind the bits that tell the lines apart."""
    settings = [one.key for one in find_factors(rows) if one.key != MECHANICS][:MOST_SETTINGS]
    names = list(STANDARD)
    place = names.index("bits") + 1
    return [*names[:place], *settings, *names[place:]]


def environments(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """The distinct environments of the runs as YAML, but for the time, with the number of runs of each."""
    counts: dict[str, int] = {}
    for run in {id(row["run"]): row["run"] for row in rows}.values():
        known = {key: value for key, value in run.environment().items() if key != "time"}
        text = as_yaml(known) if known else "not recorded"
        counts[text] = counts.get(text, 0) + 1
    return sorted(((count, text) for text, count in counts.items()), reverse=True)


def as_yaml(tree: Mapping[str, Any]) -> str:
    """Plain containers as YAML."""
    return str(yaml.dump(dict(tree), Dumper=DUMPER, sort_keys=False, allow_unicode=True))


def html_cell(one: Cell, mark: str) -> Markup:
    """A cell of a result table."""
    mean, deviation, count = one.written()
    text = escape(mean.strip("`") if deviation is None else f"{mean} ± {deviation}")
    return (Markup("<strong>{}</strong>").format(text) if one.best else text) + count + (f" {mark}" if mark else "")


def html_note(note: str) -> Markup:
    """A note of a table: bold and code as in Markdown."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(note)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))


def page(rows: Sequence[Row], table: Table, title: str, command: str, metric: str, names: Sequence[str]) -> str:
    """The whole page.

    Args:
        rows: deployments as ``collect`` gives them.
        table: their result table, a line per group.
        title: heading of the page.
        command: how it was made.
        metric: what ranks configurations and shows effects.
        names: metrics to draw curves of; see ``analysis.training_curves``.
    """
    groups = grouped(rows)
    pictures, left_out = curve_pictures(groups, names, metric)
    firsts = [group[0] for group in groups]
    factors = find_factors(firsts)
    found = analyse(rows, metric=metric) if factors else None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {"html_cell": html_cell, "html_note": html_note}
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        command=command,
        runs=len({id(row["run"]) for row in rows}),
        table=table,
        numeric=[any(line[place].values for line in table.lines) for place in range(len(table.titles))],
        curves=pictures,
        left_out=left_out,
        effects=ablation_pictures(found) if found else [],
        undrawn=[one.key for one in found.left_out] if found else [],
        unfair=found is not None and not all(found.fair),
        measured=measured_tables(rows),
        differing=[one.key for one in factors],
        together=[[one.key, *one.same] for one in factors if one.same],
        values=[[one.levels[one.of[line]] for one in factors] for line in range(len(firsts))],
        configs=[(group[0], [row["seed"] for row in group], as_yaml(group[0]["config"])) for group in groups],
        environments=environments(rows),
    )


def main(
    runs: str,
    output: str = "report.html",
    title: str = "Report",
    columns: str | None = None,
    standard: str | None = None,
    best: str = "accuracy",
    baseline: str | None = None,
    within: str = WITHIN,
    metric: str = "accuracy",
    curves: str | None = None,
) -> None:
    """Write the page.

    Args:
        runs: run folders or another source, see ``analysis.sources``.
        output: HTML file to write.
        title: heading of the page.
        columns: further columns of the result table; these and the next four are as in ``analysis.tables``.
        standard: the columns before them; all of ``analysis.columns.STANDARD`` and what varies unless given.
        best: columns whose best mean is set in bold.
        baseline: what all else is tested against.
        within: bold and tests compare rows that agree in these columns.
        metric: what ranks configurations and shows effects, any numeric column.
        curves: metrics to draw, separated by commas; None takes losses, accuracies and up to eight more.
    """
    if Path(output).suffix not in (".html", ".htm"):
        raise ValueError(f"output={output}: use a file.html")
    rows = collect(runs)
    first = split_names(standard) or told_apart(rows)
    table = result_table(rows, split_names(columns), first, split_names(best), baseline, within)
    options = {"columns": columns, "standard": standard, "baseline": baseline, "curves": curves}
    changed = (("best", best, "accuracy"), ("within", within, WITHIN), ("metric", metric, "accuracy"))
    options |= {key: value for key, value, default in changed if value != default}
    command = command_line("analysis.report", runs, options)
    atomic_write_text(Path(output), page(rows, table, title, command, metric, split_names(curves)))
    print(f"wrote {output}: {len(rows)} rows of {len(table.lines)} configurations")


if __name__ == "__main__":
    DEFAULTS = {
        "output": "report.html", "title": "Report", "columns": None, "standard": None, "best": "accuracy",
        "baseline": None, "within": WITHIN, "metric": "accuracy", "curves": None,
    }  # fmt: skip
    script(main, {"runs": REQUIRED, **DEFAULTS})
