"""Every figure is drawn from the kept records: its files, its data, its axes and legends, and no text over another."""

from __future__ import annotations

import csv
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.figures import __main__ as everything
from analysis.figures import catalogue, lsq_grids, oscillation_toy
from analysis.figures.base import RECORDS, NoData, by_label, figure_script, find, panels, save, styles
from analysis.figures.dir_net_entropy import entropy
from analysis.figures.ewgs_gradient_scale import gradient_scale
from analysis.figures.lsq_step_gradient import gradients
from analysis.rows import Row

ROOT = Path(__file__).resolve().parents[2]
CELL = 0.5
"""Pixels that two texts may share."""


@cache
def records() -> list[Row]:
    return find(str(ROOT / RECORDS))


def shown(figure: Figure) -> list[tuple[str, Bbox]]:
    """All text that is drawn, with its box in pixels: not tick labels outside of their axis' limits."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    hidden = {
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
        if not low <= tick.get_loc() <= high
    }
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that stand over one another."""
    found = []
    for (one, a), (other, b) in combinations(shown(figure), 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > CELL and height > CELL:
            found.append((one, other))
    return found


def test_the_check_of_overlaps_sees_them() -> None:
    figure, (axes,) = panels(1, 1)
    axes.set_title("one")
    assert overlaps(figure) == []
    figure.text(0.5, 0.5, "two")
    figure.text(0.51, 0.5, "three")
    assert overlaps(figure) == [("two", "three")]


@pytest.mark.parametrize("name", everything.names())
def test_every_figure_from_the_records(name: str, tmp_path: Path) -> None:
    drawn = everything.drawer(name)(records())
    for axes in drawn.figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel(), f"{name}: an axis without a label"
        series = {label for label in axes.get_legend_handles_labels()[1] if not label.startswith("_")}
        if len(series) > 1:
            assert axes.get_legend() is not None or drawn.figure.legends, f"{name}: {series} without a legend"
    assert overlaps(drawn.figure) == []
    pdf, png, data = save(drawn, tmp_path, name)
    assert pdf.read_bytes()[:5] == b"%PDF-" and png.read_bytes()[1:4] == b"PNG"
    with data.open(newline="") as file:
        header, *lines = list(csv.reader(file))
    assert header == list(drawn.header) and lines
    assert all(len(line) == len(header) for line in lines)


def test_all_of_a_slug_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything.main(str(ROOT / RECORDS), str(tmp_path), "lsq_step")
    assert "lsq_step_gradient" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".pdf", ".png"]
    with pytest.raises(ValueError, match="only=nothing: no figure begins so"):
        everything.main(str(ROOT / RECORDS), str(tmp_path), "nothing")


def test_the_page_of_figures_is_what_their_docstrings_say(tmp_path: Path) -> None:
    catalogue.main(str(tmp_path / "figures.md"))
    text = (tmp_path / "figures.md").read_text()
    assert text == (ROOT / "docs/figures.md").read_text(), "make results writes it anew"
    assert text.count("\n## ") == len(everything.names())
    assert all(f"`python -m analysis.figures.{name}" in text for name in everything.names())


def test_figures_without_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything.main(str(ROOT / "tests/records/records_float/*"), str(tmp_path), "n2uq")
    assert "no data for n2uq_thresholds" in capsys.readouterr().out
    with pytest.raises(NoData, match="no run of quantizer=n2uq"):
        everything.drawer("n2uq_thresholds")([])


def test_one_figure_as_a_command_with_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"runs={ROOT / RECORDS}", f"output={tmp_path}", "steps=40", "lr=0.05"]
    monkeypatch.setattr(sys, "argv", ["oscillation_toy", *arguments])
    figure_script(oscillation_toy.draw, oscillation_toy.__file__)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'oscillation_toy.pdf'}, .png and .csv\n"
    monkeypatch.setattr(sys, "argv", ["lsq_grids", arguments[0], "layer=nowhere"])
    with pytest.raises(SystemExit, match="2"):
        figure_script(lsq_grids.draw, lsq_grids.__file__)
    assert "layer=nowhere: no layer" in capsys.readouterr().err


def test_of_two_configurations_the_one_with_more_seeds_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    def row(seed: int, lr: float, mechanics: dict[str, Any]) -> Row:
        config = {"seed": seed, "lr": lr, "data": {"seed": seed}, "callbacks": mechanics}
        return {"seed": seed, "experiment": "e", "hash": "h", "config": config}

    tracked = {"oscillation_tracker": {"momentum": 0.1}}
    rows = [row(0, 0.1, {}), row(2, 0.2, {}), row(1, 0.2, {}), row(1, 0.2, tracked)]
    (found,) = by_label(rows, lambda row: "LSQ").values()
    assert [(row["seed"], row["config"]["lr"]) for row in found] == [(1, 0.2), (2, 0.2)]
    assert "2 configurations of LSQ" in caplog.text


def test_too_many_methods_are_refused() -> None:
    assert len(styles("abcdefg")) == 7
    with pytest.raises(ValueError, match="8 methods"):
        styles("abcdefgh")


def test_the_curves_of_the_step_gradient() -> None:
    found = gradients(torch.tensor([1.49, 1.51, 10.0], dtype=torch.float64))
    torch.testing.assert_close(found["LSQ"], torch.tensor([-0.49, 0.49, 3.0], dtype=torch.float64))
    torch.testing.assert_close(found["PACT"], torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(found["scaling only (QIL-like)"], torch.tensor([-1.49, -1.51, 0.0], dtype=torch.float64))


def test_the_gradient_scale_of_ewgs() -> None:
    t = torch.tensor([0.25, -0.25], dtype=torch.float64)
    torch.testing.assert_close(gradient_scale(t, 0.4, 1.0), torch.tensor([1.1, 0.9], dtype=torch.float64))
    torch.testing.assert_close(gradient_scale(t, 0.4, -1.0), torch.tensor([0.9, 1.1], dtype=torch.float64))


def test_entropy_of_a_code() -> None:
    assert entropy(0.5) == 1 and entropy(0.0) == 0 == entropy(1.0)
    assert entropy(0.11) == pytest.approx(0.4999, abs=1e-3)
