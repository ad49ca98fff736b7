from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from analysis.benchmark import inference, page
from analysis.benchmark.__main__ import MEASURES


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        few = ("W8A8, lsq_deploy", "W4A4, lsq_deploy", inference.FLOAT)
        patch.setattr(inference, "VARIANTS", {k: v for k, v in inference.VARIANTS.items() if k in few})
        engines = {**inference.ENGINES, "Another": ("no_such_engine", {})}
        patch.setattr(inference, "ENGINES", {k: v for k, v in engines.items() if "default" not in k})
        return inference.measure(rounds=3, model="resnet8", batches=[1, 4], size=16)


def test_every_engine_is_measured_or_says_why_not(values: dict[str, Any]) -> None:
    assert values["Another"] == {"skipped": "no_such_engine is not installed: pip install '.[no_such_engine]'"}
    for engine, package in (("ONNX Runtime", "onnxruntime"), ("OpenVINO, float32", "openvino")):
        if importlib.util.find_spec(package) is None:
            assert "not installed" in values[engine]["skipped"]
            continue
        assert values[engine]["version"] and set(values[engine]["batches"]) == {"1", "4"}
        for cells in values[engine]["batches"].values():
            assert list(cells) == ["float", "W8A8, lsq_deploy", "W4A4, lsq_deploy"]
            assert cells["float"]["speedup"] == 1 and cells["float"]["max_abs_diff"] < 1e-4
            for cell in cells.values():
                assert cell["images_per_second"] > 0 and 0 < cell["low"] <= cell["high"]
                assert cell["max_abs_diff"] < 1 and 0 <= cell["argmax_agreement"] <= 1


def test_an_engine_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "write_networks", lambda *_: None)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'nobody'")
    monkeypatch.setattr(inference.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ONNX Runtime: Traceback\nKeyError: 'nobody'"):
        inference.measure(rounds=1, model="resnet8", batches=[1], size=16)


def test_the_page_shows_the_record(values: dict[str, Any], tmp_path: Path) -> None:
    record = {"hardware": "a machine", "torch": "2", "settings": {"rounds": 3}, "values": values}
    (tmp_path / "a_machine").mkdir()
    (tmp_path / "a_machine" / "inference.json").write_text(json.dumps(record))
    text = page.page(tmp_path)
    assert "## Deployed inference" in text and "Skipped: Another: no_such_engine is not installed" in text
    lines = [line for line in text.splitlines() if line.startswith("| ONNX Runtime (")]
    assert len(lines) == 6 and all("| 1.00 | 1.00 to 1.00 |" in line for line in lines if "| float |" in line)


def test_it_is_a_subcommand() -> None:
    measure, settings = MEASURES["inference"]
    assert measure is inference.measure and settings["batches"] == [1, 64]
