"""The record of post-training quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from research.runs.folder import RunFolder
from research.runs.ptq import ptq_path, read_ptq, write_ptq


def row(bits: int, accuracy: float, **others: Any) -> dict[str, Any]:
    return {"name": "final", "range": "minmax", "bits": bits, "accuracy": accuracy, "loss": 1.0, **others}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, "float", "0123456789")


def test_rows_are_added_replaced_and_ordered(folder: RunFolder) -> None:
    assert read_ptq(folder) == []
    write_ptq(folder, [row(3, 0.2), row(8, 0.9)])
    write_ptq(folder, [row(3, 0.3), row(4, 0.5), row(3, 0.4, range="mse"), row(3, 0.1, name="eight")])
    assert [(r["name"], r["range"], r["bits"], r["accuracy"]) for r in read_ptq(folder)] == [
        ("eight", "minmax", 3, 0.1),
        ("final", "minmax", 8, 0.9),
        ("final", "minmax", 4, 0.5),
        ("final", "minmax", 3, 0.3),
        ("final", "mse", 3, 0.4),
    ]


@pytest.mark.parametrize(
    ("content", "message"), [('{"schema": 1, "ro', "truncated or corrupt: delete it"), ('{"schema": 2}', "schema 1")]
)
def test_a_damaged_record_is_named(folder: RunFolder, content: str, message: str) -> None:
    ptq_path(folder).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ptq(folder)
