"""Result tables of runs: ``python -m analysis.tables runs=GLOB [output=FILE.md|.tex|.csv] [columns=NAME,NAME]``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.cells import cell
from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from analysis.columns import STANDARD, Column, columns, split_names
from analysis.comparison import WITHIN, baselines_of, blocks, differences, fits, mark_best, mark_significance
from analysis.formats import FORMATS, Table, comma_separated, latex, markdown
from analysis.measured_tables import measured_table
from analysis.significance import LEVEL
from research.runs.files import atomic_write_text
from research.runs.folder import DISPLAY_OPTION, NOT_IDENTITY


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same experiment, deployment and configuration but for the seed, seeds in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        config = {key: value for key, value in row["config"].items() if key not in ("seed", *NOT_IDENTITY)}
        for part, display in (("data", "seed"), ("trainer", DISPLAY_OPTION)):
            config[part] = {key: value for key, value in (config.get(part) or {}).items() if key != display}
        groups.setdefault(f"{row['name']} {config}", []).append(row)
    return [sorted(group, key=lambda row: row["seed"]) for group in groups.values()]


def chosen(rows: Sequence[Row], where: str | None) -> list[list[Row]]:
    """The groups of the table: all, or those that ``where`` fits.

    Raises:
        ValueError: there is none.
    """
    groups = [group for group in grouped(rows) if where is None or fits(group, where)]
    if not groups:
        raise ValueError(f"where={where}: no row; give a method or experiment of the table, or COLUMN=VALUE")
    return groups


def result_table(
    rows: Sequence[Row],
    further: Sequence[str] = (),
    standard: Sequence[str] = tuple(STANDARD),
    best: Sequence[str] = (),
    baseline: str | None = None,
    within: str = WITHIN,
    level: float = LEVEL,
    compared: Sequence[str] = (),
    at_equal: Sequence[str] = (),
    where: str | None = None,
) -> Table:
    """The table of the runs, one line per group of seeds.

    Args:
        rows: deployments as `collect` gives them.
        further: names of columns after the standard ones.
        standard: the columns before them.
        best: columns whose best mean in each block is marked; ``-name`` where the smallest is best.
        baseline: the method, experiment or ``column=value`` pairs that all else is tested against, in the columns of
            ``best`` or else the accuracy.
        within: columns that make the blocks.
        level: p-values below it are marked.
        compared: columns that are followed by their difference from the baseline, seed by seed.
        at_equal: columns of costs, at whose equal values the difference is taken: the baseline is then the line
            through all that fit, and nothing is tested.
        where: the only rows shown: of a method or experiment, or ``column=value`` pairs.

    Raises:
        ValueError: an unknown column, a baseline that is not there or not unique, differences without a baseline, or no
            row left.
    """
    groups = chosen(rows, where)
    rows = [row for group in groups for row in group]
    shown = columns([*standard, *further], rows)
    smallest = {name.removeprefix("-"): name.startswith("-") for name in best}
    _require(shown, baseline, {"best": list(smallest), "difference": compared, "at_equal": at_equal})
    costs = [column for column in shown if column.name in at_equal]
    shown = [one for c in shown for one in ((c, *differences(c, costs)) if c.name in compared else (c,))]
    names = [column.name for column in shown]
    lines = [[cell(group, column) for column in shown] for group in groups]
    found = False
    for block, positions in blocks(groups, within) if best or baseline else ():
        members = [groups[p] for p in positions]
        fitting = baselines_of(members, baseline, block, within, several=bool(at_equal)) if baseline else []
        found = found or bool(fitting)
        for name in [name for name in smallest or ("accuracy",) if name in names]:
            column = names.index(name)
            cells = [lines[p][column] for p in positions]
            cells = mark_best(cells, smallest[name]) if name in smallest else cells
            cells = mark_significance(cells, fitting[0]) if fitting and not at_equal else cells
            for position, marked in zip(positions, cells, strict=True):
                lines[position][column] = marked
        for name in compared if fitting else ():
            for less in differences(shown[names.index(name)], costs, [members[p] for p in fitting]):
                for place, position in enumerate(positions):
                    if place not in fitting:
                        lines[position][names.index(less.name)] = cell(groups[position], less)
    if baseline and not found:
        raise ValueError(f"baseline={baseline}: no row; give a method or experiment of the table, or COLUMN=VALUE")
    table = Table([column.title for column in shown], lines, level=level)
    table.notes = _notes(table, baseline, bool(best), bool(compared), [cost.title for cost in costs], within)
    return table


def _require(shown: Sequence[Column], baseline: str | None, asked: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError where a comparison is asked for (columns by option) that the table cannot make."""
    known = [column.name for column in shown]
    for option, names in asked.items():
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{option}={name}: no column of this table; use one of {', '.join(known)}, or add columns="
                )
            if option != "at_equal" and next(column.number for column in shown if column.name == name) is None:
                raise ValueError(f"{option}={name}: a column of text; use one of numbers, such as accuracy")
    if asked["at_equal"] and not asked["difference"]:
        raise ValueError(f"at_equal={','.join(asked['at_equal'])}: which difference? Give difference= as well")
    if asked["difference"] and not baseline:
        raise ValueError(f"difference={','.join(asked['difference'])}: from what? Give baseline= as well")


def _notes(
    table: Table, baseline: str | None, best: bool, differences: bool, costs: Sequence[str], within: str
) -> list[str]:
    """What the marks of a table mean."""
    notes, alike = [], within.replace(",", ", ")
    if best:
        notes.append(f"**Bold**: the best mean among rows of equal {alike}.")
    if baseline and not costs:
        notes.append(
            f"↑ ↓: above or below the baseline `{baseline}` of equal {alike}: Welch's two-sided "
            f"t-test over seeds, p < {table.level:g}, not corrected for the number of comparisons; a mean of one seed "
            "is not tested."
        )
    if costs:
        notes.append(
            f"Δ at equal {' or '.join(costs)}: the number less that of the rows with `{baseline}` of equal {alike} at "
            "that cost, on the straight line between the two nearest ones, seed by seed; – beyond the ends of the line."
        )
    elif differences:
        notes.append("Δ: the number less that of the baseline's run with the same seed.")
    if any(not cell.converged for line in table.lines for cell in line):
        notes.append("~: an estimate that has not converged.")
    return notes


def page(table: Table, form: str, title: str, preface: str, command: str) -> str:
    """The whole output file in a format; all but CSV say by which command they were made."""
    if form == "csv":
        return comma_separated(table)
    if form == "latex":
        return f"% Generated from run folders: {command}\n{latex(table, title)}\n"
    return f"# {title}\n\n{preface}{markdown(table)}\n\nGenerated from run folders: `{command}`.\n"


def main(
    runs: str,
    output: str | None = None,
    title: str = "Results",
    preface: str | None = None,
    columns: str | None = None,
    measured: str | None = None,
    standard: str | None = None,
    best: str | None = None,
    baseline: str | None = None,
    difference: str | None = None,
    at_equal: str | None = None,
    where: str | None = None,
    within: str = WITHIN,
    level: float = LEVEL,
    format: str | None = None,  # noqa: A002  (the word on the command line)
) -> None:
    """Print the table, or write it as a page that says where it comes from.

    Args:
        runs: run folders or another source, see ``analysis.sources``.
        output: file to write; its suffix (md, tex, csv) is the format. None prints.
        title: heading of the page, caption in LaTeX.
        preface: Markdown file whose text goes between heading and table.
        columns: further columns, separated by commas: metrics (``val/loss``), configuration (``optimizer.lr``),
            ``changes`` (the overrides of the experiment), ``ptq_<bits>`` (accuracy after post-training quantization),
            ``measurement:curvature.trace``, fields of a deployment (``macs``).
        measured: in place of the runs their measurements of one kind (``curvature``), a line each.
        standard: the columns before them, all of ``analysis.columns.STANDARD`` unless given.
        best: columns whose best mean is set in bold, ``-NAME`` where the smallest is best.
        baseline: method, experiment or ``COLUMN=VALUE`` that all else is tested against by Welch's t-test.
        difference: columns that are followed by their difference from the baseline.
        at_equal: columns of costs (``gbops``, ``size_kib``): the difference is taken at equal cost, from the line
            through all rows that ``baseline`` fits.
        where: the only rows that are shown: a method, an experiment or ``COLUMN=VALUE`` pairs, such as ``epochs=10``.
        within: bold and tests compare rows that agree in these columns.
        level: p-values below it are marked.
        format: markdown, latex or csv; None goes by the suffix of ``output``.
    """
    form = format or FORMATS.get(Path(output or "table.md").suffix.lstrip("."), "")
    if form not in FORMATS.values():
        key, value = ("format", format) if format else ("output", output)
        raise ValueError(f"{key}={value}: use a file.md, file.tex or file.csv, or format={'|'.join(FORMATS.values())}")
    if output and format and FORMATS.get(Path(output).suffix.lstrip("."), format) != format:
        raise ValueError(f"format={format}: output={output} is another one; leave format= out")
    if not 0 < level < 1:
        raise ValueError(f"level={level:g}: use a number between 0 and 1, such as {LEVEL:g}")
    if measured is not None:
        asked = {"columns": columns, "standard": standard, "best": best, "baseline": baseline}
        asked |= {"difference": difference, "at_equal": at_equal}
        for option, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{option}={value}: a table of runs takes it, one of measurements does not; leave it out"
                )
        table = measured_table([row for group in chosen(collect(runs), where) for row in group], measured)
    else:
        own = {"standard": split_names(standard)} if standard else {}
        table = result_table(
            collect(runs), split_names(columns), best=split_names(best), baseline=baseline, within=within,
            level=level, compared=split_names(difference), at_equal=split_names(at_equal), where=where,
            **own,
        )  # fmt: skip
    if output is None:
        print({"markdown": markdown(table), "latex": latex(table, title), "csv": comma_separated(table)}[form].rstrip())
        return
    options = {"columns": columns, "measured": measured, "standard": standard, "best": best, "baseline": baseline}
    options |= {"difference": difference, "at_equal": at_equal, "where": where}
    options |= {"within": within if within != WITHIN else None, "level": f"{level:g}" if level != LEVEL else None}
    command = command_line("analysis.tables", runs, options)
    atomic_write_text(Path(output), page(table, form, title, preface_text(preface), command))


def preface_text(preface: str | None) -> str:
    """What stands between heading and table, an empty line behind it; empty without a preface.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    if preface is None:
        return ""
    path = Path(preface)
    text = path.read_text().strip() if path.is_file() else ""
    if not text:
        raise ValueError(f"preface={preface}: {'nothing in it' if path.is_file() else 'no such file'}")
    return text + "\n\n"


def command_line(module: str, runs: str, options: Mapping[str, str | None]) -> str:
    """The command that makes an output again, without options that are None."""
    words = [f"{key}={value}" for key, value in options.items() if value is not None]
    return " ".join([f"python -m {module} 'runs={runs}'", *map(shlex.quote, words)])


if __name__ == "__main__":
    DEFAULTS = {
        "output": None, "title": "Results", "preface": None, "columns": None, "measured": None, "standard": None,
        "best": None, "baseline": None, "difference": None, "at_equal": None, "within": WITHIN, "level": LEVEL,
        "format": None, "where": None,
    }  # fmt: skip
    script(main, {"runs": REQUIRED, **DEFAULTS})
