"""The same rows from run folders, W&B's offline files and a W&B project, as far as each knows."""

from __future__ import annotations

import inspect
import json
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from analysis.collect import collect
from analysis.configurations import complete, read_yaml
from analysis.rows import FIELDS, Row
from analysis.sources import read_runs
from analysis.tables import grouped
from analysis.wandb_file import BLOCK, read_offline
from analysis.wandb_source import offline_files, online_runs
from callbacks.sam import SAM
from research.runs.folder import RunFolder
from research.runs.logger import finish_wandb, wandb_logger
from research.runs.records import Metric, read_config, read_metrics, read_summary
from tests.analysis.run_folders import write_run

UNKNOWN_TO_WANDB = {"path", "changes", "hardware", "epochs", "steps", "seconds", "schema", "run", "parity"}


def mirror(folder: RunFolder, metrics: list[Metric]) -> None:
    """Log to W&B offline as training does, and wait until its own process has written the file."""
    logger = wandb_logger(folder, read_config(folder.config_path))
    assert logger is not None
    for (step, epoch), rows in groupby(metrics, lambda row: (row.step, row.epoch)):
        logger.log_metrics({"epoch": epoch} | {row.name: row.value for row in rows}, step)
    finish_wandb(logger, folder)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        files = offline_files(folder.wandb)
        if files and read_offline(files[-1]).summary.get("final/accuracy") is not None:
            return
        time.sleep(0.1)
    raise AssertionError("W&B wrote no summary")


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with its W&B mirror; a second start goes on from step 9 and logs a row that crosses blocks."""
    folder = write_run(tmp_path_factory.mktemp("runs"), 0.8, seed=3, callbacks={"sam": {"rho": 0.1}})
    logged = read_metrics(folder.metrics_path)
    torn = [Metric(14, 1, "train/step/loss", 9.0)]  # behind the checkpoint: the resumed start logs this step again
    mirror(folder, [row for row in logged if row.step <= 9] + torn)
    wide = [Metric(29, 2, f"wide/{number}/{'x' * 100}", float(number)) for number in range(2 * BLOCK // 100)]
    mirror(folder, [row for row in logged if row.step > 9] + wide)
    return folder


def known(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in UNKNOWN_TO_WANDB}


def test_offline_files_tell_what_the_run_folder_tells(mirrored: RunFolder) -> None:
    (expected,) = read_runs(str(mirrored.path))
    for where in (mirrored.wandb, f"{mirrored.wandb}/offline-run-*"):
        (found,) = read_runs(str(where))
        (row,), history = found.rows, found.history()
        own = {name: value for name, value in row["metrics"].items() if not name.startswith("wide/")}
        assert known(row) | {"metrics": own} == known(expected.rows[0])
        assert sorted(m for m in history if not m.name.startswith("wide/")) == sorted(expected.history())
        assert sum(m.name.startswith("wide/") for m in history) == 2 * BLOCK // 100
        assert set(FIELDS) <= row.keys() and row["changes"] is None and row["hardware"] is None
        assert row["path"].name.startswith("offline-run-") and found.measurements == []


def test_a_file_that_was_cut_off_ends_at_its_last_whole_record(mirrored: RunFolder, tmp_path: Path) -> None:
    data = offline_files(mirrored.wandb)[0].read_bytes()
    (tmp_path / "run.wandb").write_bytes(data[:-5])
    whole, cut = read_offline(offline_files(mirrored.wandb)[0]), read_offline(tmp_path / "run.wandb")
    assert cut.config == whole.config and cut.history == whole.history[: len(cut.history)] != []


@pytest.mark.parametrize(("position", "message"), [(0, "no W&B file of a known version"), (40, "corrupt at byte 7")])
def test_a_damaged_file_is_refused(mirrored: RunFolder, tmp_path: Path, position: int, message: str) -> None:
    data = bytearray(offline_files(mirrored.wandb)[0].read_bytes())
    data[position] ^= 1
    (tmp_path / "run.wandb").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_offline(tmp_path / "run.wandb")


class Api:
    """What is used of ``wandb.Api``: a finished run and one that is still training."""

    def __init__(self, folder: RunFolder) -> None:
        self.history = [{"trainer/global_step": m.step, "epoch": m.epoch, m.name: m.value, "_step": 1, "_runtime": 2}
                        for m in read_metrics(folder.metrics_path)]  # fmt: skip
        last = {key: value for logged in self.history for key, value in logged.items()}
        (deployment,) = read_summary(folder.summary_path)["deployments"]
        own = {f"final/{key}": value for key, value in deployment.items() if isinstance(value, int | float)}
        self.items = [
            self.run(folder, last | own, self.history),
            self.run(folder, last, self.history),
        ]

    @staticmethod
    def run(folder: RunFolder, summary: dict[str, Any], history: list[dict[str, Any]]) -> SimpleNamespace:
        config = read_config(folder.config_path) | {"_wandb": {}}
        return SimpleNamespace(
            id=folder.hash, config=config, summary=summary, metadata=None, scan_history=lambda: iter(history)
        )

    def runs(self, project: str) -> list[SimpleNamespace]:
        if project != "us/flatbit":
            raise ValueError(f"Could not find project {project}")
        return self.items


def test_a_project_tells_what_the_run_folder_tells(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8, callbacks={"sam": {"rho": 0.1}})
    (expected,), (found,) = read_runs(str(folder.path)), online_runs("us/flatbit", Api(folder))
    assert known(found.rows[0]) == known(expected.rows[0])
    assert found.history() == expected.history() and found.environment() == {}
    with pytest.raises(ValueError, match="^runs=wandb:us/nothing: Could not find project.*wandb login"):
        online_runs("us/nothing", Api(folder))


def test_wandb_is_the_word_for_a_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    folder = write_run(tmp_path, 0.8)
    monkeypatch.setattr(wandb, "Api", lambda: Api(folder))
    (run,) = read_runs("wandb:us/flatbit")
    assert run.rows[0]["hash"] == folder.hash


def test_a_run_of_several_sources_counts_once_and_the_first_speaks(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, 0.8, seed=seed) for seed in (0, 1)]
    found = read_runs(f"{folders[1].path},{tmp_path}/*/*")
    assert [run.rows[0]["seed"] for run in found] == [1, 0]


def test_environment_and_measurements_come_from_the_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8)
    folder.measurements.mkdir()
    record = {"schema": 1, "kind": "curvature", "settings": {}, "subject": "a", "values": {"trace": 1.0}}
    (folder.measurements / "curvature-0.json").write_text(json.dumps(record))
    (run,) = read_runs(str(folder.path))
    assert run.measurements == [record] and run.environment()["python"] == "3.11.7"


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n- x\n- {c: 2}\nd: {}\n# note\n",
        "a: &one [1]\nb: *one\n",
        "a: {b: 1,\n}\n",
        "- seed=1\n- x\n",
        "a: 'one\n\n  two'\nb: 1.5\n",
        "",
    ],
)
def test_reading_by_blocks_changes_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert (read_yaml(path) or None) == (yaml.safe_load(text) or None)


def test_blocks_of_two_runs_are_not_one_object(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: {b: [1]}\n")
    read_yaml(path)["a"]["b"].append(2)
    assert read_yaml(path) == {"a": {"b": [1]}}
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"config.yaml is not YAML"):
        read_yaml(path)


def test_a_run_older_than_an_option_is_the_configuration_of_one_with_its_default(tmp_path: Path) -> None:
    new = {"_target_": "callbacks.sam.SAM", "rho": 0.1, "adaptive": True, "eta": 0.01}
    old = {key: new[key] for key in ("_target_", "adaptive")}
    gone = {"_target_": "callbacks.sam.Gone", "adaptive": True}
    configs = [{"callbacks": {"sam": dict(options)}, "name": "a"} for options in (new, old, gone)]
    complete(configs)
    default = inspect.signature(SAM).parameters["rho"].default
    assert [config["callbacks"]["sam"] for config in configs] == [new, new | {"rho": default}, gone]
    assert str(configs[1]["callbacks"]["sam"]) == str(new | {"rho": default}), "in one order too"

    for seed, options in ((0, {}), (1, {"eta": 0.01}), (2, {"eta": 0.5})):
        write_run(tmp_path, 0.8, seed=seed, callbacks={"sam": {"_target_": "callbacks.sam.SAM", "rho": 0.1} | options})
    assert [[row["seed"] for row in group] for group in grouped(collect(f"{tmp_path}/*/*"))] == [[0, 1], [2]]
