import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.runs.folder import RunFolder
from research.runs.records import Metric, MetricsRecord, read_config, read_metrics, read_summary, write_summary


def test_metrics_read_back_exactly_across_two_openings(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    values = {"train/loss": 0.1 + 0.2, 'odd, "name"': -1e-308, "val/acc": math.inf}
    for step in (0, 1):
        record = MetricsRecord(path)
        record.append(step, 0 if step else None, values)
        record.close()
    assert path.read_text().startswith("step,epoch,name,value\n0,,train/loss,0.30000000000000004\n")
    assert read_metrics(path) == [Metric(s, e, n, v) for s, e in ((0, None), (1, 0)) for n, v in values.items()]


@settings(max_examples=30, deadline=None)
@given(value=st.floats())
def test_every_float_survives(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    record = MetricsRecord(path)
    record.append(0, 0, {"x": value})
    record.close()
    (row,) = read_metrics(path)
    assert row.value == value or (math.isnan(row.value) and math.isnan(value))


def test_truncate_drops_later_steps_and_a_torn_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    record = MetricsRecord(path)
    for step in range(4):
        record.append(step, 0, {"loss": step / 3})
    record.close()
    path.write_text(path.read_text() + "1,0,loss,0.12")
    resumed = MetricsRecord(path)
    resumed.truncate_after(1)
    resumed.append(2, 1, {"loss": 7.0})
    resumed.close()
    assert read_metrics(path) == [Metric(0, 0, "loss", 0.0), Metric(1, 0, "loss", 1 / 3), Metric(2, 1, "loss", 7.0)]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no metrics record"):
        read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds no config"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ValueError, match=r"is not YAML: .*"):
        read_config(tmp_path / "torn.yaml")


def test_summary_has_identity_deployments_and_extra_fields(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "mini", {"seed": 3})
    rows = [{"name": "last", "accuracy": 0.25}, {"name": "w2", "accuracy": 0.125}]
    write_summary(folder, 3, rows, {"epochs": 2})
    identity = {"schema": 1, "experiment": "mini", "hash": folder.hash, "seed": 3}
    assert read_summary(folder.summary_path) == {**identity, "deployments": rows, "epochs": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2, "deployments": [1]}', '{"schema": 1}'])
def test_a_bad_summary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match="no summary of a finished run"):
        read_summary(tmp_path / "summary.json")
