"""Collecting, tabulating and keeping run folders, on folders made by the real record writers."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import ttest_ind

from analysis import keep, tables
from analysis.cells import four_digits
from analysis.cli import script
from analysis.collect import collect
from analysis.columns import columns, method, split_names, weight_quantizer
from analysis.formats import markdown
from analysis.measured_tables import measured_table
from analysis.significance import welch
from research.runs.allocation import ALLOCATION
from research.runs.folder import RunFolder
from research.runs.ptq import write_ptq
from research.runs.records import MetricsRecord, write_config, write_json, write_summary
from tests.analysis.run_folders import keep_measurement, sweep_of_two, write_run

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
    lines = markdown(tables.result_table(collect(f"{tmp_path}/*/*"))).splitlines()
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
    tables.main(f"{tmp_path}/runs/*/*", output, "Title", preface, "quantizer.weight.name,changes")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Title\n\nRead this first.\n\n| experiment |")
    assert "| lsq | – |" in page
    assert "Generated from run folders: `python -m analysis.tables 'runs=" in page
    (tmp_path / "preface.md").write_text("\n")
    with pytest.raises(ValueError, match="nothing in it"):
        tables.main(f"{tmp_path}/runs/*/*", output, "Title", preface)
    assert (tmp_path / "page.md").read_text() == page


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
    (folder.path / ALLOCATION).write_text("conv1: null\n")
    keep.main(f"{tmp_path}/runs/*/*", str(tmp_path / "records"))
    assert {path.name for path in kept.iterdir()} == names | {ALLOCATION}


def test_widths_that_a_search_chose_are_not_those_of_the_recipe(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8, callbacks={"sam": {"rho": 0.1}})
    write_run(tmp_path, 0.8, callbacks={"bmpq": {"budget": {"kind": "average_bits", "value": 3}}})
    assert sorted(shown(tmp_path, standard=["bits"])) == [["4/4"], ["searched"]]


def test_32_bits_are_no_quantizer() -> None:
    slot = {"name": "lsq", "bits": 32}
    assert weight_quantizer({"quantizer": {"weight": slot}}) == "float"
    assert weight_quantizer({"quantizer": {"weight": {**slot, "bits": 2}}}) == "lsq"


def test_a_table_says_which_quantizer_the_weights_have() -> None:
    spec = {"name": "minmax", "bits": 4}
    table = {"conv1": {"weight": {**spec, "name": "lsq"}}, "a": {"weight": spec}, "b": {"weight": spec}}
    config = {"quantizer": {"weight": {"name": "lsq"}, "table": table}}
    assert method({"config": config, "mechanics": ["sam"]}) == "minmax+sam"
    assert method({"config": {"quantizer": {**config["quantizer"], "table": None}}, "mechanics": None}) == "lsq"
    floats = {"config": {"quantizer": {"weight": None, "table": None}}, "mechanics": None}
    assert method(floats) == "float"
    assert [column.title for column in columns(["accuracy"], [floats])] == ["accuracy %"]
    assert [column.title for column in columns(["accuracy"], [floats, {"config": config}])] == ["quantized %"]


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
    found = re.search(r"`python -m analysis.tables (.*?)`", page.read_text())
    if found is None:
        pytest.skip("not a page of analysis.tables")
    given = dict(word.split("=", 1) for word in shlex.split(found[1]))
    rows = collect(str(ROOT / given.pop("runs")))
    if "measured" in given:
        assert markdown(measured_table(rows, given["measured"])) in page.read_text()
        return
    lists = {
        "columns": "further",
        "standard": "standard",
        "best": "best",
        "difference": "compared",
        "at_equal": "at_equal",
    }
    options = {lists.get(key, key): split_names(value) if key in lists else value for key, value in given.items()}
    assert markdown(tables.result_table(rows, **options)) in page.read_text()


def shown(root: Path, *further: str, **options: Any) -> list[list[str]]:
    """The cells below the header of a table."""
    table = tables.result_table(collect(f"{root}/*/*"), further, **options)
    lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_columns_of_settings_metrics_fields_overrides_and_accuracies_after_quantization(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.8), (1, 0.82)):
        folder = write_run(tmp_path, accuracy, seed=seed, typed=["optimizer.lr=0.1"])
        if seed:
            row = {"name": "final", "range": "minmax", "bits": 4, "accuracy": 0.5, "loss": 1.0}
            write_ptq(folder, [row])
    names = ("changes", "optimizer.lr", "quantizer.rules", "val/accuracy", "val/loss", "macs", "loss", "ptq_4")
    assert shown(tmp_path, *names, standard=["seeds"]) == [
        ["0, 1", "`optimizer.lr=0.1`", "0.1", "[]", "81.00 ± 1.41", "0 ± 0", "1000", "0.5000 ± 0.0000", "50.00 (n=1)"]
    ]


def test_what_is_gained_on_the_float_network_is_taken_seed_by_seed(tmp_path: Path) -> None:
    rows = [{**row, "float_accuracy": row["accuracy"] + 0.02} for seed, accuracy in ((1, 0.80), (2, 0.86))
            for row in collect(str(make_run(tmp_path, seed, accuracy).path))]  # fmt: skip
    assert "| -2.00 ± 0.00 |" in markdown(tables.result_table(rows, further=["gain"]))
    (none,) = collect(str(make_run(tmp_path, 3, 0.9).path))
    assert markdown(tables.result_table([{**none, "float_accuracy": None}], further=["gain"])).endswith(" – |")


def test_an_unknown_column_names_its_like(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8)
    with pytest.raises(ValueError, match=r"^columns=optimizer.lrr: no run knows it; did you mean optimizer.lr"):
        shown(tmp_path, "optimizer.lrr")
    with pytest.raises(ValueError, match=r"^best=val/loss: no column of this table"):
        shown(tmp_path, best=["-val/loss"])
    with pytest.raises(ValueError, match="^output=page.pdf: use a file.md"):
        tables.main("x", "page.pdf")
    with pytest.raises(ValueError, match="^format=html: use a file.md"):
        tables.main("x", "page.md", format="html")


def test_measurements_are_chosen_by_kind_settings_and_path(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_run(tmp_path, 0.8, seed=seed)
        for surface, trace in (("quantized", 2.0 + seed), ("latent", 7.0)):
            values = {
                "trace": {"value": trace, "standard_error": 0.5},
                "eigenvalues": {"values": [{"value": 4.0, "converged": seed == 0}], "steps": 3},
                "layers": {"layer1.0.conv1": {"norm": 0.25}},
            }
            keep_measurement(folder, "curvature", {"surface": surface, "deployment": "final"}, values)
    name = "measurement:curvature[surface=quantized]"
    paths = (".trace", ".trace.standard_error", ".eigenvalues.values.0", ".layers.layer1.0.conv1.norm")
    found = shown(tmp_path, *(name + path for path in paths), standard=["seeds"])
    assert found == [["0, 1", "2.500 ± 0.707", "0.5000 ± 0.0000", "~4 ± 0", "0.2500 ± 0.0000"]]
    for column, message in (
        ("measurement:curvature.trace", r"2 values in sweep/\w+; choose by settings, such as \[surface=latent\]"),
        (name + ".eigenvalues", "no single value; go on with .values or .steps"),
        (name + ".nothing", "no run knows it"),
        ("measurement:curvature[surface].trace", "use measurement:<kind>"),
    ):
        with pytest.raises(ValueError, match=f"columns={re.escape(column)}: {message}"):
            shown(tmp_path, column)


def test_another_deployment_than_the_rows_is_chosen_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8)
    for deployment, trace in (("final", 2.0), ("initial", 5.0)):
        keep_measurement(folder, "curvature", {"deployment": deployment}, {"trace": {"value": trace}})
    names = ("measurement:curvature.trace", "measurement:curvature[deployment=initial].trace")
    assert shown(tmp_path, *names, standard=["seeds"]) == [["0", "2", "5"]]


def test_measurements_of_one_kind_in_place_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, 0.8)
    for seed in (0, 1):
        values = {"trace": {"value": 2.0 + seed, "standard_error": 0.5}, "top": {"value": 3.0, "converged": seed == 0}}
        keep_measurement(folder, "curvature", {"deployment": "final", "seed": seed}, values)
    tables.main(f"{tmp_path}/*/*", measured="curvature")
    lines = capsys.readouterr().out.splitlines()
    label = f"sweep/{folder.hash}"
    assert lines[0] == "| run | seed | trace | top |"
    assert sorted(lines[2:4]) == [f"| {label} | 0 | 2 ± 0.5 | 3 |", f"| {label} | 1 | 3 ± 0.5 | ~3 |"]
    assert lines[-1] == "~: an estimate that has not converged."
    tables.main(f"{tmp_path}/*/*", measured="curvature", where="optimizer.lr=1e-1")
    assert capsys.readouterr().out.splitlines() == lines
    for option, message in (
        ({"where": "optimizer.lr=1"}, "^where=optimizer.lr=1: no row"),
        ({"best": "accuracy"}, "^best=accuracy: a table of runs takes it, one of measurements does not"),
        ({"columns": "macs"}, "^columns=macs: a table of runs takes it"),
        ({"level": 0}, "^level=0: use a number between 0 and 1"),
        ({"output": f"{tmp_path}/t.md", "format": "csv"}, "^format=csv: output=.*t.md is another one"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.main(f"{tmp_path}/*/*", measured="curvature", **option)
    with pytest.raises(ValueError, match="measured=sharpness: the runs have no such measurements; use curvature"):
        tables.main(f"{tmp_path}/*/*", measured="sharpness")


def test_latex_is_escaped_and_balanced(tmp_path: Path) -> None:
    sweep_of_two(tmp_path / "runs")
    output = tmp_path / "table.tex"
    options = {
        "best": "accuracy",
        "baseline": "lsq",
        "within": "optimizer.lr",
        "standard": "experiment,method,accuracy",
    }
    tables.main(
        f"{tmp_path}/runs/*/*", str(output), "50 % & more", columns="optimizer.lr,optimizer._target_", **options
    )
    text = output.read_text()
    assert r"\caption{50 \% \& more}" in text and r"optimizer.\_target\_" in text
    assert r"& \textbf{86.00 $\pm$ 1.00} $\uparrow$ &" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:-1]
    assert len(body) == 4 and all(line.count("&") == 4 and line.endswith(r"\\") for line in body)
    assert [text.count(word) for word in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert len(re.findall(r"(?<!\\){", text)) == len(re.findall(r"(?<!\\)}", text))
    assert text.startswith("% Generated from run folders: python -m analysis.tables 'runs=")


def test_csv_has_full_numbers_deviations_counts_and_p_values(tmp_path: Path) -> None:
    sweep_of_two(tmp_path / "runs")
    output = tmp_path / "table.csv"
    options = {"best": "accuracy", "baseline": "lsq", "within": "optimizer.lr", "standard": "method,accuracy"}
    tables.main(f"{tmp_path}/runs/*/*", str(output), columns="optimizer.lr", **options)
    with output.open(newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: (line["method"], line["optimizer.lr"]))
    assert list(lines[0]) == [
        "method",
        "quantized %",
        "quantized % sd",
        "quantized % n",
        "quantized % p",
        "optimizer.lr",
    ]
    assert float(lines[2]["quantized %"]) == pytest.approx(86.0, rel=1e-12) and lines[2]["quantized % n"] == "3"
    assert float(lines[2]["quantized % p"]) == pytest.approx(ttest_ind([1, 2, 3], [6, 7, 8], equal_var=False).pvalue)
    assert lines[0]["quantized % p"] == ""


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0, 4.0], [2.0, 2.5]), ([0.1, 0.1], [0.3, 0.5, 0.1, 0.2]), ([5.0, 6.0], [5.0, 6.0])],
)
def test_welch_is_scipys(first: list[float], second: list[float]) -> None:
    assert welch(first, second) == pytest.approx(ttest_ind(first, second, equal_var=False).pvalue, rel=1e-12)


def test_nothing_is_tested_without_spread_or_a_second_value() -> None:
    assert welch([1.0], [2.0, 3.0]) is welch([2.0, 3.0], [1.0]) is welch([1.0, 1.0], [2.0, 2.0]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234567.0, "1234567"), (40551040.5, "4.055e+07"), (0.0123456, "0.01235"),
                        (12.3456, "12.35"), (-2.5e-7, "-2.500e-07"), (12345.6, "12346")]
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert f"{value:{four_digits(value)}}" == text


@pytest.mark.slow
def test_a_thousand_runs_make_a_table_in_under_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time of the whole command, python's start included, so that a busy machine does not count."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if hasattr(yaml, "CSafeDumper"):
        monkeypatch.setattr(yaml, "safe_dump", partial(yaml.dump, Dumper=yaml.CSafeDumper))
    for lr in range(1, 201):
        for seed in range(5):
            write_run(tmp_path, 0.8 + 0.001 * seed, seed=seed, lr=0.01 * lr)
    command = [sys.executable, "-m", "analysis.tables", f"runs={tmp_path}/*/*", "best=accuracy"]
    before = os.times()
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    after = os.times()
    assert len([line for line in output.splitlines() if line.startswith("| sweep")]) == 200
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert spent < 4
