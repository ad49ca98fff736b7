"""The page of a sweep: what it holds, that it needs nothing else, and that a browser shows it without complaint."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from analysis import report
from analysis.collect import collect
from analysis.measured_tables import measured_tables, single_numbers
from analysis.tables import grouped
from analysis.training_curves import CHARTS, curves, draw
from research.runs.records import MetricsRecord
from tests.analysis.run_folders import keep_measurement, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARK = "<b>not markup</b>"
ACTIONS = """<script>
addEventListener("load", () => {
  const head = [...document.querySelectorAll("#lines th")].find(one => one.textContent === "quantized %");
  head.firstElementChild.click();
  head.firstElementChild.click();
  filter.value = "SAM";
  filter.dispatchEvent(new Event("input"));
  document.title = [
    head.getAttribute("aria-sort"), body.rows[0].cells[0].textContent, shown.textContent,
    document.documentElement.scrollWidth <= innerWidth,
    [...document.images].every(one => one.complete && one.naturalWidth > 0),
  ].join("|");
});
</script>"""
"""Sorts by accuracy, the greatest first, filters, and says in the title what came of it."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of nine configurations; the last has a measurement, and an option that looks like markup."""
    root = tmp_path_factory.mktemp("report")
    for position in range(8):
        for seed in (0, 1):
            write_run(root / "runs", 0.70 + 0.02 * position + 0.001 * seed, seed=seed, lr=0.1 * (position + 1))
    folder = write_run(root / "runs", 0.9, callbacks={"sam": {"rho": 0.1, "note": MARK}}, typed=["callbacks=[sam]"])
    values = {"eigenvalues": {"value": 12.5, "converged": False}, "trace": {"value": 3.5, "standard_error": 0.25}}
    keep_measurement(folder, "curvature", {"surface": "latent"}, values)
    report.main(f"{root}/runs/*/*", str(root / "report.html"), "A sweep", baseline="optimizer.lr=0.1,method=lsq")
    return root / "report.html"


class Outline(HTMLParser):
    """Tags, headings and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_everything_and_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text()
    outline = Outline(text)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"results", "curves", "effects", "measurements", "configurations", "environment"} <= set(ids)
    links = [attributes["href"] for attributes in outline.all("a")]
    assert links and all(link is not None and link[0] == "#" and link[1:] in ids for link in links)
    assert not outline.all("link") and not any("src" in attributes for attributes in outline.all("script"))
    pictures = outline.all("img")
    assert pictures and all(one["alt"] for one in pictures)
    for one in pictures:
        kind, _, data = str(one["src"]).partition(",")
        svg = base64.b64decode(data).decode()
        assert kind == "data:image/svg+xml;base64"
        assert svg.count("<svg") == 1 and not re.search(r'(?:href|src)="(?!#)', svg)
    assert MARK not in text and "&lt;b&gt;not markup&lt;/b&gt;" in text
    assert "17 finished runs of 9 configurations" in text and "<strong>90.00</strong>" in text
    assert "~12.50" in text and "3.500 ± 0.25" in text
    assert len(outline.all("pre")) == 9 + 1  # configurations, and the one environment of all
    assert "torch: 2.13.0" in text and "baseline=optimizer.lr=0.1,method=lsq</code>" in text


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The page in headless Chromium, which has no network and writes its console to the standard error."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        "--disable-background-networking", "--disable-component-update", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install --no-install-recommends chromium")
def test_a_browser_shows_it_sorts_and_filters_without_complaint(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    acting = tmp_path / "acting.html"
    acting.write_text(text.replace("</body>", ACTIONS + "</body>"))
    done = browse(acting, tmp_path / "profile", "--window-size=500,900", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    order, first, shown, fits, drawn = title[1].split("|")
    best = 1 + max(range(9), key=lambda place: grouped(collect(f"{page.parent}/runs/*/*"))[place][0]["accuracy"])
    assert (order, first, shown, fits, drawn) == ("descending", str(best), "1 of 9 lines", "true", "true")
    assert console(done) == []
    intruding = tmp_path / "intruding.html"
    intruding.write_text(text.replace("</main>", '<img src="http://example.org/a.png" alt=""></main>'))
    assert "Content Security Policy" in console(browse(intruding, tmp_path / "profile", "--dump-dom"))[0]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install --no-install-recommends chromium")
def test_a_screenshot_shows_more_than_an_empty_page(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    assert console(browse(page, tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={shot}")) == []
    with Image.open(shot) as image:
        assert image.size == (1280, 2000) and len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_curves_are_means_over_seeds_and_the_seven_best_are_told_apart(page: Path) -> None:
    groups = grouped(collect(f"{page.parent}/runs/*/*"))
    found = curves(groups)
    assert [chart.metric for chart in found.charts] == ["val/accuracy", "val/loss"]
    assert found.left_out == ["train/step/loss"]
    chart = found.charts[0]
    (place,) = (number for number, group in enumerate(groups) if group[0]["config"]["optimizer"]["lr"] == 0.2)
    line = chart.lines[place]
    assert chart.unit == "epochs done" and line.x == [1, 2, 3]
    assert line.mean == pytest.approx([0.6205, 0.6705, 0.7205])
    assert line.low == pytest.approx([0.62, 0.67, 0.72]) and line.high == pytest.approx([0.621, 0.671, 0.721])
    figure = draw(chart, list(reversed(range(9))))
    assert [text.get_text() for text in figure.legends[0].texts] == [*map(str, range(3, 10)), "others"]
    named = curves(groups, ["train/step/loss"])
    assert [chart.metric for chart in named.charts] == ["train/step/loss"] and "val/loss" in named.left_out
    with pytest.raises(ValueError, match="^curves=val/los: no run logged it; use one of"):
        curves(groups, ["val/los"])


def test_a_metric_without_epochs_goes_over_steps_and_charts_are_limited(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8)
    record = MetricsRecord(folder.metrics_path)
    record.append(4, None, {f"probe/{number:02}": 1.0 for number in range(CHARTS)})
    record.close()
    found = curves(grouped(collect(str(folder.path))))
    assert len(found.charts) == CHARTS and found.charts[0].metric == "val/accuracy"
    assert found.charts[2].unit == "optimizer steps done" and found.charts[2].lines[0].x == [5]
    assert found.left_out == ["probe/10", "probe/11", "train/step/loss"]


def test_a_page_of_one_run_has_no_effects(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8)
    report.main(str(folder.path), str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    assert 'id="effects"' not in text and 'id="measurements"' not in text and 'id="differences"' not in text
    assert "1 finished run of 1 configuration." in text
    with pytest.raises(ValueError, match=r"^output=.*report\.pdf: use a file\.html"):
        report.main(str(folder.path), str(tmp_path / "report.pdf"))


def test_numbers_of_a_measurement_keep_their_marks(tmp_path: Path) -> None:
    values = {"a": {"converged": False, "b": 2.0}, "list": [1, 2], "top": [{"value": 3.0}], "word": "x", "flag": True}
    assert dict(single_numbers(values)) == {"a.b": "~2", "top.0": "3"}
    folder = write_run(tmp_path, 0.8)
    for rho in (0.1, 0.2):
        keep_measurement(folder, "sharpness", {"rho": rho, "form": "worst"}, {"rise": rho, "list": [1]})
    (table,) = measured_tables(collect(str(folder.path)))
    assert table.kind == "sharpness" and table.titles == ["run", "rho", "rise"] and table.left_out == []
    assert sorted(line[1:] for line in table.lines) == [["0.1", "0.1000"], ["0.2", "0.2000"]]
