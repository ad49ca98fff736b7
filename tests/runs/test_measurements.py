"""Measurements in the run folder: made once, found again, never those of other weights or settings."""

from pathlib import Path

import pytest

from research.runs.folder import RunFolder
from research.runs.measurements import measured, read_measurements
from research.runs.records import write_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.of(tmp_path, "lsq", {"seed": 1})
    made.path.mkdir(parents=True)
    write_config(made.config_path, {"seed": 1})
    made.final.write_bytes(b"weights")
    return made


def test_a_measurement_is_made_once(folder: RunFolder) -> None:
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"trace": 0.1 + len(calls)}

    first = measured(folder, "curvature", {"k": 1}, folder.final, measure)
    again = measured(folder, "curvature", {"k": 1}, folder.final, measure)
    assert first == again == read_measurements(folder, "curvature")[0] and len(calls) == 1
    measured(folder, "curvature", {"k": 2}, folder.final, measure)
    folder.final.write_bytes(b"other weights")
    measured(folder, "curvature", {"k": 1}, folder.final, measure)
    assert len(calls) == 3 and len(read_measurements(folder, "curvature")) == 3
    assert read_measurements(folder, "landscape") == []


def test_what_cannot_be_trusted_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        measured(folder, "curvature", {}, folder.final, lambda: {"trace": float("nan")})
    assert read_measurements(folder, "curvature") == []
    measured(folder, "curvature", {}, folder.final, lambda: {"trace": 1.0})
    (path,) = folder.measurements.glob("*.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="delete it and measure again"):
        read_measurements(folder, "curvature")
    folder.final.unlink()
    with pytest.raises(ValueError, match=r"final\.safetensors is missing"):
        measured(folder, "curvature", {}, folder.final, lambda: {})
