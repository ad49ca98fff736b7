"""What all meters have in common: a run with them is the run without them, bit for bit; what they write survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from callbacks.bin_occupancy import RECORD
from research.learning.module import QuantModule
from research.learning.prepare import Preparation
from research.runs.checkpoint import RunCheckpoint, VerifiedCheckpointIO, load_checkpoint
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from research.runs.records import Metric, read_metrics
from tests.conformance.registry import FIRST
from tests.learning.tiny import LAST, StopAt, differences, fit, float_weights, make_data, make_module, tiny_net

METERS = ("bin_occupancy", "curvature_probe", "oscillation_tracker", "weight_flips")
NOISY = tiny_net(dropout=0.25)
QUICK = {
    "bin_occupancy": {"images": 8},
    "curvature_probe": {
        "every_n_epochs": 1,
        "quantities": ["top_eigenvalue", "hessian_norm", "saq_sharpness"],
        "images": 8,
        "batch_size": 6,
        "max_iterations": 3,
    },
    "weight_flips": {"every_n_steps": 2},
    "oscillation_tracker": {},
}
DOREFA: dict[str, Any] = {"weight": {"name": "dorefa", "bits": 2}, "input": {"name": "dorefa", "bits": 2}}
EWGS: dict[str, Any] = {"weight": {"name": "ewgs", "bits": 2}, "input": {"name": "ewgs", "bits": 2}}


def meters(*slugs: str) -> dict[str, Any]:
    return {slug: {**FIRST[slug].config, **QUICK[slug]} for slug in slugs}


def seen(module: QuantModule, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The last checkpoint and the metrics of a fit of two epochs, without what belongs to the meters."""
    metrics = fit(module, folder=folder, **options).callback_metrics
    saved = load_checkpoint(folder / LAST)
    saved["state_dict"] = {name: t for name, t in saved["state_dict"].items() if not name.startswith("mechanics.")}
    del saved["hyper_parameters"], saved["callbacks"]
    own = ("curvature/", *(f"{slug}/" for slug in METERS))
    return saved, {name: float(value) for name, value in metrics.items() if not name.startswith(own)}


@pytest.mark.parametrize(
    ("settings", "trainer", "slugs"),
    [
        ({}, {}, METERS),
        ({"precision": "bf16"}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, METERS),
        ({"quantizer": EWGS}, {}, METERS),
        # DoReFa keeps the magnitude of the weights whose codes it last gave, which the tracker asks for
        ({"quantizer": DOREFA}, {}, ("bin_occupancy", "curvature_probe", "weight_flips")),
    ],
    ids=["float32", "bf16", "ewgs", "dorefa"],
)
def test_a_run_with_meters_is_the_run_without(
    settings: dict[str, Any], trainer: dict[str, Any], slugs: tuple[str, ...], tmp_path: Path
) -> None:
    weights = float_weights(tmp_path / "float.safetensors", NOISY)
    common = {"model": NOISY, "checkpoint": weights, **settings}
    plain, metrics = seen(make_module(**common), tmp_path / "plain", **trainer)
    measured, same = seen(make_module(meters(*slugs), **common), tmp_path / "measured", **trainer)
    assert differences(plain, measured) == []
    assert metrics == same and "train/loss" in metrics


def record(module: QuantModule, folder: RunFolder, crash: bool = False, resume: bool = False) -> None:
    """Train two epochs of four steps into a run folder, as ``research.train`` does; a crash comes before step 6."""
    logger = RunLogger(folder)
    last = folder.path / LAST if resume else None
    if last is not None:
        logger.truncate_after(load_checkpoint(last)["global_step"] - 1)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        callbacks=[Preparation(1, 16), RunCheckpoint(folder.checkpoints), *([StopAt(6)] if crash else [])],
        logger=[logger],
        plugins=[VerifiedCheckpointIO()],
        default_root_dir=folder.path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=make_data(), ckpt_path=last)


def records(folder: RunFolder) -> tuple[list[Metric], list[Metric]]:
    """Rows of the metrics and of the occupancies, but for times."""
    rows = read_metrics(folder.metrics_path)
    return [row for row in rows if "seconds" not in row.name], read_metrics(folder.path / RECORD)


def test_what_meters_write_survives_a_crash(tmp_path: Path) -> None:
    mechanics = meters("bin_occupancy", "weight_flips")
    whole, parts = (RunFolder(tmp_path / name, "tiny", name) for name in ("whole", "parts"))
    record(make_module(mechanics, model=NOISY), whole)
    with pytest.raises(RuntimeError, match="stopped"):
        record(make_module(mechanics, model=NOISY), parts, crash=True)
    assert {row.step for row in records(parts)[0] if "flips" in row.name} == {1, 3, 5}
    (parts.path / RECORD).open("a").write("5,1,conv1.weight/0,0.5\n")  # of a look that no checkpoint knows of
    record(make_module(mechanics, model=NOISY), parts, resume=True)
    assert records(parts) == records(whole)
    metrics, shares = records(whole)
    assert [row.step for row in metrics if row.name == "weight_flips/all"] == [1, 3, 5, 7]
    assert {(row.step, row.epoch) for row in shares} == {(3, 0), (7, 1)}


def test_a_trainer_without_a_run_folder_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(make_module(meters("bin_occupancy")), max_epochs=1, limit_train_batches=1)
    assert list(tmp_path.iterdir()) == []
