"""Every figure is drawn from the kept records: its files, its data, its axes and legends, and no text over another."""

from __future__ import annotations

import csv
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.figures import __main__ as everything
from analysis.figures.base import RECORDS, NoData, find, panels, save, styles
from analysis.figures.dir_net_entropy import entropy
from analysis.figures.ewgs_gradient_scale import gradient_scale
from analysis.figures.lsq_step_gradient import gradients
from analysis.rows import Row

ROOT = Path(__file__).resolve().parents[2]
CELL = 0.5
"""Pixels that the boxes of two texts may share."""


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


def test_figures_without_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything.main(str(ROOT / "tests/records/records_float/*"), str(tmp_path), "n2uq")
    assert "no data for n2uq_thresholds" in capsys.readouterr().out
    with pytest.raises(NoData, match="no run of quantizer=n2uq"):
        everything.drawer("n2uq_thresholds")([])


def test_one_figure_as_a_command_with_its_options(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "analysis.figures.lsq_grids", f"output={tmp_path}", "layer=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "layer=nowhere: no layer" in done.stderr and "layer2.0.conv2" in done.stderr


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
