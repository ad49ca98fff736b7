"""What all figures share: runs grouped by method, histories over seeds, styles that survive grey, saving with the data.

A figure is a module ``<slug>_<what>`` with a function ``draw(rows, **options) -> Drawn``; `figure_script` makes it a
command. Its runs are ``runs=`` globs, separated by commas, or folders that hold ``<experiment>/<hash>``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cli import script
from analysis.collect import Row, collect
from analysis.labels import MEASURING, setting
from analysis.rows import label
from research.runs.files import atomic_write_text

plt.style.use(Path(__file__).parent.parent / "style.mplstyle")

log = logging.getLogger(__name__)

RECORDS = "tests/records/*/*"
COLOURS = ("#000000", "#c04a1b", "#1f6fb4", "#3f9a5b", "#8d5fb0", "#c98f00", "#7a7a7a")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


Style = dict[str, Any]
"""Keywords of ``Axes.plot``: colour, line and marker."""


class NoData(ValueError):
    """The runs hold nothing for this figure; the message says what it needs."""


class Drawn(NamedTuple):
    """A figure and the numbers in it.

    Attributes:
        figure: the picture.
        header: column names of the data.
        table: the data, one row per line of the CSV.
    """

    figure: Figure
    header: tuple[str, ...]
    table: list[tuple[Any, ...]]


class Curve(NamedTuple):
    """A metric over training, of several seeds.

    Attributes:
        x: optimizer steps done, or epochs done.
        mean: over seeds.
        low, high: least and greatest over seeds.
    """

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


Draw = Callable[..., Drawn]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each of up to seven names, the baseline first; the same order gives the same styles.

    Raises:
        ValueError: more names than can be told apart.
    """
    distinct = list(dict.fromkeys(names))
    if len(distinct) > len(LINES):
        raise ValueError(f"runs= hold {len(distinct)} methods ({', '.join(distinct)}): use {len(LINES)} at most")
    looks = zip(distinct, COLOURS, LINES, MARKERS, strict=False)
    return {name: {"color": colour, "linestyle": line, "marker": mark} for name, colour, line, mark in looks}


def plain(style: Style) -> Style:
    """The style without markers, for curves of many points."""
    return {**style, "marker": "none"}


def panels(lines: int, columns: int, width: float = 3.6, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, each ``width`` by ``height`` inches, and its axes row by row."""
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    return figure, list(axes.flat)


def save(drawn: Drawn, output: Path, name: str) -> list[Path]:
    """Write ``<name>.pdf``, ``.png`` and ``.csv`` into ``output``; their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{name}.{suffix}" for suffix in ("pdf", "png", "csv")]
    drawn.figure.savefig(paths[0], metadata={"CreationDate": None})  # the same figure is the same file
    drawn.figure.savefig(paths[1])
    plt.close(drawn.figure)
    lines = [",".join(map(_cell, row)) for row in (drawn.header, *drawn.table)]
    atomic_write_text(paths[2], "\n".join(lines) + "\n")
    return paths


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if any(mark in text for mark in ',"\n') else text


def find(runs: str) -> list[Row]:
    """Rows of all finished runs that ``runs`` names, see the module.

    Raises:
        ValueError: one of the patterns matches no finished run.
    """
    return collect(",".join(f"{part}/*/*" if _holds_experiments(Path(part)) else part for part in runs.split(",")))


def _holds_experiments(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "config.yaml").is_file()


def option(row: Row, mechanic: str, key: str) -> Any:
    """An option of one of the run's mechanics, None where the run has not that mechanic or option."""
    return (row["config"]["callbacks"].get(mechanic) or {}).get(key)


def comparable(rows: Iterable[Row], what: str, wanted: Callable[[Row], bool]) -> list[Row]:
    """Those rows of one setting that ``wanted`` accepts: of the setting with the most of them.

    Raises:
        NoData: none; ``what`` says what a run must be.
    """
    settings: dict[str, list[Row]] = {}
    for row in rows:
        if wanted(row):
            settings.setdefault(setting(row), []).append(row)
    if not settings:
        raise NoData(f"no run with {what}")
    return max(settings.values(), key=len)


def identity(row: Row) -> dict[str, Any]:
    """The part of a run's configuration that shapes its weights, but for the seed."""
    config = {key: value for key, value in row["config"].items() if key not in ("name", "seed", "logger", "deploy")}
    config["data"] = {key: value for key, value in config["data"].items() if key != "seed"}
    config["callbacks"] = {key: value for key, value in config["callbacks"].items() if key not in MEASURING}
    return config


def by_label(rows: Sequence[Row], name: Callable[[Row], str], order: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Runs by what ``name`` calls them, one for each seed, seeds in order; names in ``order`` first, in that order.

    Of several configurations with one name the one with the most seeds is taken, and a warning says so.
    """
    found: dict[str, list[dict[int, Row]]] = {}
    for row in rows:
        configurations = found.setdefault(name(row), [])
        for seeds in configurations:
            if identity(next(iter(seeds.values()))) == identity(row):
                seeds.setdefault(row["seed"], row)
                break
        else:
            configurations.append({row["seed"]: row})
    chosen = {}
    for called, configurations in found.items():
        seeds = max(configurations, key=len)
        chosen[called] = [seeds[seed] for seed in sorted(seeds)]
        if len(configurations) > 1:
            taken = label(chosen[called][0])
            log.warning("%d configurations of %s: the figure shows that of %s", len(configurations), called, taken)
    return {
        key: chosen[key]
        for key in [*(key for key in order if key in chosen), *(key for key in chosen if key not in order)]
    }


def history(row: Row, name: str) -> list[tuple[int, int | None, float]]:
    """``(steps done, epochs done, value)`` of a logged metric of one run, in order; empty where it was not logged."""
    return [
        (m.step + 1, None if m.epoch is None else m.epoch + 1, m.value) for m in row["run"].history() if m.name == name
    ]


def curve(rows: Sequence[Row], name: str, factor: float = 1.0, steps: bool = False) -> Curve:
    """A metric over training, of runs that differ in their seed; empty where none logged it.

    Args:
        rows: of the seeds.
        name: as in ``metrics.csv``.
        factor: on the values, such as 100 for percent.
        steps: over optimizer steps done instead of epochs done.
    """
    values: dict[float, list[float]] = {}
    for row in rows:
        for step, epoch, value in history(row, name):
            values.setdefault(step if steps or epoch is None else epoch, []).append(factor * value)
    x = sorted(values)
    return Curve(x, [mean(values[i]) for i in x], [min(values[i]) for i in x], [max(values[i]) for i in x])


def plot_curve(axis: Axes, found: Curve, style: Style, name: str) -> None:
    """The mean as a line, the range over seeds as a band."""
    axis.plot(found.x, found.mean, label=name, **style)
    if found.low != found.high:
        axis.fill_between(found.x, found.low, found.high, color=style["color"], alpha=0.15, linewidth=0)


def plot_points(axis: Axes, values: Mapping[str, Sequence[float]], looks: Mapping[str, Style]) -> None:
    """For each name, below which they stand: the mean over seeds as its marker, every seed as a small ring."""
    for place, (name, seeds) in enumerate(values.items()):
        axis.plot([place, place], [min(seeds), max(seeds)], color="0.5", linewidth=0.8)
        axis.plot(place, mean(seeds), **{**looks[name], "markersize": 7})
        axis.plot([place + 0.12] * len(seeds), seeds, "o", color="black", markersize=3, markerfacecolor="white")
    axis.set_xticks(range(len(values)), list(values))
    axis.set_xlim(-0.5, len(values) - 0.5)


def figure_script(draw: Draw, path: str) -> None:
    """Command line of one figure: ``runs=``, ``output=`` and the options of ``draw`` with their defaults.

    Args:
        draw: the figure.
        path: ``__file__`` of its module; its stem is the figure's name.
    """
    name = Path(path).stem
    options = {key: item.default for key, item in list(inspect.signature(draw).parameters.items())[1:]}

    def main(runs: str, output: str, **given: Any) -> None:
        pdf, *_ = save(draw(find(runs), **given), Path(output), name)
        print(f"wrote {pdf}, .png and .csv")

    script(main, {"runs": RECORDS, "output": "figures", **options})
