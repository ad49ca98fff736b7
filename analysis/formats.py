"""Output formats of a result table: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.cells import Cell
from analysis.significance import LEVEL

FORMATS = {"md": "markdown", "tex": "latex", "csv": "csv"}
"""Format by suffix of the output file."""


@dataclass
class Table:
    """Titles and lines of cells, with what a reader must be told about marks."""

    titles: list[str]
    lines: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    level: float = LEVEL

    def mark(self, cell: Cell) -> str:
        """An arrow where the cell is significantly above or below the baseline."""
        if cell.p is None or cell.p >= self.level:
            return ""
        return "↑" if cell.above else "↓"


def markdown(table: Table) -> str:
    """A Markdown table; the notes stand below it."""
    lines = [_bar(table.titles), "|" + " --- |" * len(table.titles)]
    lines += [_bar([_markdown_cell(cell, table.mark(cell)) for cell in line]) for line in table.lines]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell, mark: str) -> str:
    mean, deviation, count = cell.written()
    text = mean.replace("|", r"\|") if deviation is None else f"{mean} ± {deviation}"
    return (f"**{text}**" if cell.best else text) + count + (f" {mark}" if mark else "")


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip
"""What LaTeX reads as a command or does not have."""


def escaped(text: str) -> str:
    """Text that LaTeX sets as it stands; code spans lose their ticks, bold stays bold."""
    return "".join(LATEX.get(letter, letter) for letter in text.replace("`", "").replace("**", ""))


def latex(table: Table, title: str) -> str:
    """A ``table`` environment for the packages booktabs and graphicx; the notes stand below the rules."""
    numeric = [any(line[column].values for line in table.lines) for column in range(len(table.titles))]
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escaped(title)}}}",
        r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"  \begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}",
        r"    \toprule",
        f"    {' & '.join(map(escaped, table.titles))} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(_latex_cell(cell, table.mark(cell)) for cell in line)} \\\\" for line in table.lines),
        r"    \bottomrule",
        r"  \end{tabular}}",
        *(rf"  \par\smallskip\footnotesize {escaped(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_cell(cell: Cell, mark: str) -> str:
    mean, deviation, count = cell.written()
    text = escaped(mean if deviation is None else f"{mean} ± {deviation}")
    return (rf"\textbf{{{text}}}" if cell.best else text) + escaped(count) + (f" {escaped(mark)}" if mark else "")


def comma_separated(table: Table) -> str:
    """CSV for programs: numbers in full, each with its deviation and count of seeds, p-values where tested."""
    tested = any(cell.p is not None for line in table.lines for cell in line)
    numeric = [any(line[column].values is not None for line in table.lines) for column in range(len(table.titles))]
    header = []
    for title, number in zip(table.titles, numeric, strict=True):
        header += [title, f"{title} sd", f"{title} n", *([f"{title} p"] if tested else [])] if number else [title]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for line in table.lines:
        row: list[object] = []
        for cell, number in zip(line, numeric, strict=True):
            if number:
                count = len(cell.values or ())
                row += [cell.text if cell.mean is None else cell.mean, cell.deviation, count]
                row += [cell.p] if tested else []
            else:
                row.append(cell.text.strip("`"))
        writer.writerow(row)
    return buffer.getvalue()
