"""Collecting, tabulating and keeping run folders, on folders made by the real record writers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import keep, tables
from analysis.cli import script
from analysis.collect import collect
from research.runs.folder import RunFolder
from research.runs.records import MetricsRecord, write_config, write_json, write_summary

ROW = {
    "name": "final", "float_accuracy": 0.9, "accuracy": 0.8, "deployed_accuracy": 0.801, "size_kib": 66.3,
    "compression": 15.8, "bops": 0.19e9,
}  # fmt: skip


def make_run(root: Path, seed: int, accuracy: float, bits: int = 2, finished: bool = True) -> RunFolder:
    config = {
        "name": "lsq", "seed": seed, "data": {"name": "synthetic", "seed": seed},
        "quantizer": {"weight": {"name": "lsq", "bits": bits}, "input": {"name": "lsq", "bits": bits}}, "callbacks": {},
    }  # fmt: skip
    folder = RunFolder.of(root, "lsq", config)
    write_config(folder.config_path, config)
    write_config(folder.overrides_path, [f"seed={seed}"])
    write_config(folder.table_path, {"conv1": None})
    write_json(folder.environment_path, {})
    record = MetricsRecord(folder.metrics_path)
    record.append(0, 0, {"train/loss": 1.0})
    record.close()
    if finished:
        extra = {"bits": bits, "mechanics": ["sam"], "epochs": 3, "seconds": 60.0, "hardware": "a CPU"}
        write_summary(folder, seed, [{**ROW, "accuracy": accuracy}], extra)
    return folder


def test_seeds_share_a_line_with_mean_and_deviation(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.80), (2, 0.82)):
        make_run(tmp_path, seed, accuracy)
    make_run(tmp_path, 1, 0.9, bits=4)
    make_run(tmp_path, 3, 0.1, finished=False)
    lines = tables.markdown(collect(f"{tmp_path}/*/*")).splitlines()
    assert len(lines) == 2 + 2
    two = next(line for line in lines if "| 2/2 |" in line)
    assert "| 1, 2 |" in two
    assert "| 81.00 ± 1.41 |" in two
    assert "lsq+sam" in two
    assert "| 90.00 |" in next(line for line in lines if "| 4/4 |" in line)


def test_page_names_its_source(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", 1, 0.8)
    (tmp_path / "preface.md").write_text("Read this first.\n")
    output, preface = str(tmp_path / "page.md"), str(tmp_path / "preface.md")
    tables.main(f"{tmp_path}/runs/*/*", output, "Title", preface, "quantizer.weight.name,quantizer.weight.init")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Title\n\nRead this first.\n\n| experiment |")
    assert "| lsq | – |" in page
    assert "Generated from run folders: `python -m analysis.tables 'runs=" in page


def test_keep_copies_the_record_and_no_weights(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", 1, 0.8)
    folder.final.write_bytes(b"weights")
    keep.main(f"{tmp_path}/runs/*/*", str(tmp_path / "records"))
    kept = tmp_path / "records" / "lsq" / folder.hash
    names = {path.name for path in kept.iterdir()}
    assert names == {
        "config.yaml", "overrides.yaml", "environment.json", "metrics.csv", "table.yaml", "summary.json"
    }  # fmt: skip
    assert collect(str(kept))[0]["accuracy"] == 0.8


def test_nothing_finished_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 0.8, finished=False)
    with pytest.raises(ValueError, match="no finished run"):
        collect(f"{tmp_path}/*/*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "runs= is missing"), (["foo=1"], "foo is unknown"), (["runs=/nowhere/*"], "no finished run there")],
)
def test_scripts_answer_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", *arguments])
    defaults: dict[str, Any] = {"runs": "???", "output": None, "title": "T", "preface": None, "columns": None}
    with pytest.raises(SystemExit) as stopped:
        script(tables.main, defaults)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/results").glob("*.md")), ids=lambda path: path.stem)
def test_result_pages_are_what_the_records_generate(page: Path) -> None:
    found = re.search(r"`python -m analysis.tables 'runs=(.*?)'(?: columns=(.*?))?`", page.read_text())
    assert found is not None
    columns = found[2].split(",") if found[2] else ()
    assert tables.markdown(collect(str(ROOT / found[1])), columns) in page.read_text()


def test_further_columns_hold_overrides_settings_and_accuracies_after_quantization() -> None:
    rows = [
        {"changes": "optimizer.lr=1", "config": {"optimizer": {"lr": 1.0}}, "ptq_4": value, "ptq_mse_4": None}
        for value in (0.5, 0.6)
    ]
    assert tables.further(rows, "changes") == "`optimizer.lr=1`"
    assert tables.further([{"changes": ""}], "changes") == "–"
    assert tables.further(rows, "optimizer.lr") == "1.0"
    assert tables.further(rows, "optimizer.momentum") == "–"
    assert tables.further(rows, "ptq_4") == "55.00 ± 7.07"
    assert tables.further(rows, "ptq_mse_4") == tables.further(rows, "ptq_3") == "–"
