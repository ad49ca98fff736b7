"""What collecting and keeping make of a run that was quantized after training."""

from __future__ import annotations

from pathlib import Path

from analysis import keep
from analysis.collect import collect
from research.runs.ptq import write_ptq
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
