"""Collecting: runs that were quantized after training, and the tidy table of all runs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from analysis import keep
from analysis.collect import collect, main, tidy, write_tidy
from analysis.columns import widths_from
from research.runs.ptq import write_ptq
from research.runs.records import read_config, write_config
from tests.analysis.run_folders import keep_measurement, write_run
from tests.analysis.test_tables import make_run


def test_a_kept_record_carries_the_accuracies_after_training(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", 1, 0.8)
    (row,) = collect(str(folder.path))
    assert not [key for key in row if key.startswith("ptq")]
    accuracies = {8: 0.79, 3: 0.31}
    rows = [
        {"name": name, "range": kind, "bits": bits, "accuracy": accuracy + extra, "loss": 1.0}
        for bits, accuracy in accuracies.items()
        for name, kind, extra in (("final", "minmax", 0.0), ("final", "mse", 0.1), ("another", "minmax", 0.2))
    ]
    write_ptq(folder, rows)
    keep.main(f"{tmp_path}/runs/*/*", str(tmp_path / "records"))
    (row,) = collect(f"{tmp_path}/records/*/*")
    found = {key: value for key, value in row.items() if key.startswith("ptq")}
    assert found == {"ptq_8": 0.79, "ptq_3": 0.31, "ptq_mse_8": 0.79 + 0.1, "ptq_mse_3": 0.31 + 0.1}


def test_a_tidy_table_has_a_line_for_each_deployment_and_reads_back(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", 0.8, callbacks={"sam": {"rho": 0.1}}, typed=["optimizer.lr=0.1"])
    write_run(tmp_path / "runs", 0.9, lr=1, callbacks={})
    for suffix in ("csv", "parquet"):
        main(f"{tmp_path}/runs/*/*", str(tmp_path / f"runs.{suffix}"), None)
    table = pyarrow.parquet.read_table(tmp_path / "runs.parquet")
    lines = sorted(table.to_pylist(), key=lambda line: line["accuracy"])
    assert [line["accuracy"] for line in lines] == [0.8, 0.9]
    assert [line["config.callbacks.sam.rho"] for line in lines] == [0.1, None]
    assert [line["config.optimizer.lr"] for line in lines] == [0.1, 1.0]
    assert lines[0]["changes"] == "optimizer.lr=0.1" and lines[0]["parity.count"] == 8
    assert lines[0]["mechanics"] == '["sam"]' and lines[0]["metrics.val/loss"] == 0.0
    assert table.schema.field("steps").type == "int64" and table.schema.field("config.optimizer.lr").type == "double"
    with (tmp_path / "runs.csv").open(newline="") as file:
        read = sorted(csv.DictReader(file), key=lambda line: line["accuracy"])
    assert list(read[0]) == table.column_names
    assert [line["config.callbacks.sam.rho"] for line in read] == ["0.1", ""]
    assert float(read[1]["metrics.val/accuracy"]) == lines[1]["metrics.val/accuracy"]


def test_what_chose_the_widths(tmp_path: Path) -> None:
    found = {
        "sweeps/allocations/ssps.yaml": "ssps",
        "'runs/bmpq_w3/0123456789/allocation.yaml'": "bmpq_w3",
        "allocation.yaml": "allocation.yaml",
    }
    for seed, typed in enumerate(found):
        folder = write_run(tmp_path, 0.8, seed=seed, typed=["quantizer.table=other.yaml", f"quantizer.table={typed}"])
        config = read_config(folder.config_path)
        config["quantizer"]["table"] = {"conv1": {"weight": {"name": "lsq", "bits": 3}}}
        write_config(folder.config_path, config)
    write_run(tmp_path, 0.8, seed=3, callbacks={"sam": {"rho": 0.1}, "sdq": {"budget": {"kind": "average_bits"}}})
    write_run(tmp_path, 0.8, seed=4, callbacks={"sam": {"rho": 0.1}})
    rows = sorted(collect(f"{tmp_path}/*/*"), key=lambda row: row["seed"])
    assert list(map(widths_from, rows)) == [*found.values(), "sdq", "recipe"]
    assert widths_from({**rows[0], "table_from": None}) is None, "a source that knows no overrides"
    assert widths_from({**rows[4], "config": {"quantizer": {"weight": None}}}) is None, "a float network"


def test_numbers_and_words_in_one_column_are_words(tmp_path: Path) -> None:
    rows = [{"a": value, "b": None, "config": {}, "metrics": {}} for value in (1, "auto", None)]
    assert tidy(rows) == {"a": ["1", "auto", None], "b": [None, None, None]}


def test_further_columns_of_a_tidy_table_leave_out_what_did_not_converge(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "runs", 0.8, seed=seed) for seed in (0, 1)]
    for folder, converged in zip(folders, (True, False), strict=True):
        keep_measurement(folder, "curvature", {}, {"trace": {"value": 2.5, "converged": converged}})
    name = "measurement:curvature.trace"
    main(f"{tmp_path}/runs/*/*", str(tmp_path / "runs.csv"), name)
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert {line["seed"]: line[name] for line in csv.DictReader(file)} == {"0": "2.5", "1": ""}


def test_another_suffix_or_no_pyarrow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^output=runs.xlsx: use a file.parquet or file.csv"):
        write_tidy({"a": [1]}, Path("runs.xlsx"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'flatbit\[analysis\]'"):
        write_tidy({"a": [1]}, tmp_path / "runs.parquet")
