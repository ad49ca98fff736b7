"""What the repository keeps of real runs: small, without weights, and without places or names of machines."""

from __future__ import annotations

import re
from pathlib import Path

RECORDS = Path(__file__).resolve().parents[1] / "records"
PLACE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|mnt|data|usr)\b|[A-Za-z]:\\\\|hostname|\buser\b")


def files() -> list[Path]:
    return [path for path in RECORDS.rglob("*") if path.is_file()]


def test_they_are_small_and_hold_no_weights() -> None:
    assert files()
    assert {path.suffix for path in files()} <= {".yaml", ".json", ".csv"}
    assert sum(path.stat().st_size for path in files()) < 3_000_000


def test_they_name_no_place() -> None:
    assert [path for path in files() if PLACE.search(path.read_text())] == []


def test_every_one_is_a_finished_run() -> None:
    folders = {path.parent for path in RECORDS.glob("*/*/config.yaml")}
    assert folders and all((folder / "summary.json").is_file() for folder in folders)
