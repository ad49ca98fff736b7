import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest

from research.runs.folder import RunFolder
from research.runs.logger import RunLogger, finish_wandb, wandb_logger
from research.runs.records import Metric, read_metrics, write_summary

HEADER_BYTES = 7  # of an offline W&B file
ROWS = [(0, {"train/loss": 0.1 + 0.2, "epoch": 0}), (3, {"val/accuracy": 2 / 3, "val/loss": 1e-17, "epoch": 1})]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "mini", {"seed": 1})


def test_metrics_and_epoch_reach_the_record(folder: RunFolder) -> None:
    logger = RunLogger(folder)
    for step, metrics in ROWS:
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    logger.log_metrics({"test/accuracy": 0.5}, 4)
    assert (logger.name, logger.version) == ("mini", folder.hash)
    assert read_metrics(folder.metrics_path) == [
        Metric(0, 0, "train/loss", 0.1 + 0.2),
        Metric(3, 1, "val/accuracy", 2 / 3),
        Metric(3, 1, "val/loss", 1e-17),
        Metric(4, None, "test/accuracy", 0.5),
    ]


def test_wandb_offline_has_the_same_numbers(folder: RunFolder) -> None:
    mode = os.environ.get("WANDB_MODE")
    loggers = [RunLogger(folder), wandb_logger(folder, {"seed": 1})]
    assert loggers[1] is not None and loggers[1].version == folder.hash
    for step, metrics in ROWS:
        for logger in loggers:
            logger.log_metrics(metrics, step)
    write_summary(folder, 1, [{"name": "final", "accuracy": 0.75, "parity": {"count": 8}}])
    finish_wandb(loggers[1], folder)
    assert os.environ.get("WANDB_MODE") == mode
    (database,) = folder.wandb.glob(f"offline-run-*-{folder.hash}/run-{folder.hash}.wandb")
    deadline = time.monotonic() + 20  # W&B's own process writes the file, shortly after finish
    while database.stat().st_size <= HEADER_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    metrics, summary = wandb_numbers(database)
    assert in_order(metrics) == in_order(read_metrics(folder.metrics_path))
    assert summary["final/accuracy"] == 0.75


def in_order(metrics: list[Metric]) -> list[tuple[object, ...]]:
    """W&B does not keep the order of the names of one step."""
    return sorted((metric.step, metric.name, metric.epoch, metric.value) for metric in metrics)


def wandb_numbers(database: Path) -> tuple[list[Metric], dict[str, float]]:
    """History and summary of an offline run: a header, then protobuf records behind checksum, length and type."""
    from wandb.proto import wandb_internal_pb2

    data, position = database.read_bytes(), HEADER_BYTES
    metrics, summary = [], {}
    while position < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind == 1, "a record that is split over blocks: log less in this test"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        own = {name: value for name, value in row.items() if not name.startswith("_")}
        if own:
            step, epoch = own.pop("trainer/global_step"), own.pop("epoch")
            metrics += [Metric(step, epoch, name, value) for name, value in own.items()]
        summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    return metrics, summary


def test_wandb_refusals_name_their_key(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logger.wandb.mode=dryrun: use one of offline, online, disabled"):
        wandb_logger(folder, {}, mode="dryrun")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^logger.wandb.dir: cannot write in .*Not a directory"):
        wandb_logger(folder, {}, directory=tmp_path / "file")


def test_disabled_does_not_even_import_wandb(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_logger(folder, {}, mode="disabled") is None
