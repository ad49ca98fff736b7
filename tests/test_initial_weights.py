"""Float weights to start from: those that do not fit, and those exchanged under their name."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from research.models import resnet8
from research.runs.records import read_config
from research.train import main as train
from tests.test_bad_input import STEPS_PER_EPOCH, TINY, Trouble, command, trouble


def float_file(path: Path, how: str) -> Path:
    """A file for `init_from` with something wrong about it; `how` says what."""
    state = resnet8(num_classes=10, in_channels=3, shortcut="A", preactivation=False, width=8).state_dict()
    if how == "pickled":
        torch.save(state, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    save_file(state, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("another architecture", "conv1.weight has shape (8, 3, 3, 3), the model expects (4, 3, 3, 3); use the model"),
        ("truncated", "truncated or corrupt"),
        ("pickled", "pickled weights can run code and are not read; use a .safetensors file"),
    ],
)
def test_float_weights_that_do_not_fit(how: str, says: str, tmp_path: Path) -> None:
    path = float_file(tmp_path / "float.safetensors", how)
    line = command(train, *TINY, f"paths.runs={tmp_path}/runs", f"init_from={path}").refusal()
    assert line.startswith(f"error: init_from={path}: ") and says in line
    assert not (tmp_path / "runs").exists(), "refused before anything is written"


def test_float_weights_exchanged_under_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "float.safetensors"

    def write_weights(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(resnet8(num_classes=10, in_channels=3, width=4).state_dict(), path)

    write_weights(0)
    arguments = [*TINY, f"paths.runs={tmp_path}/runs", f"init_from={path}", *trouble(STEPS_PER_EPOCH + 1, "stop")]
    monkeypatch.setattr(Trouble, "armed", True)
    assert command(train, *arguments).refusal() == "error: stopped"
    monkeypatch.setattr(Trouble, "armed", False)
    write_weights(1)
    line = command(train, *arguments).refusal()
    assert line.startswith(f"error: init_from={path}: the interrupted run ") and line.endswith("use another name=")
    write_weights(0)
    assert command(train, *arguments).code == 0
    assert "other weights" not in (again := command(train, *arguments)).err and "already done" in again.err + again.out
    write_weights(1)
    done = command(train, *arguments)
    assert (
        done.code == 0 and "it started from other weights than are there now; use another name=" in done.err + done.out
    )
    path.unlink()
    assert "other weights" not in (gone := command(train, *arguments)).err + gone.out and gone.code == 0


def test_of_an_experiments_runs_each_seed_starts_from_its_own(tmp_path: Path) -> None:
    def start(experiment: str, seed: int, *settings: str) -> str:
        fixed = (*TINY, "trainer.max_epochs=1", f"paths.runs={tmp_path}")
        done = command(train, *fixed, f"name={experiment}", f"seed={seed}", *settings)
        assert done.code == 0
        (folder,) = (path.parent for path in tmp_path.glob(f"{experiment}/*/config.yaml") if seed_in(path) == seed)
        return folder.name

    def seed_in(path: Path) -> int:
        return int(read_config(path)["seed"])

    def started_from(experiment: str, run: str) -> str:
        return json.loads((tmp_path / experiment / run / "environment.json").read_text())["initial_weights"]

    def digest(run: str) -> str:
        return sha256((tmp_path / "float" / run / "final.safetensors").read_bytes()).hexdigest()

    floats = [start("float", seed, "quantizer=float") for seed in (0, 1)]
    assert digest(floats[0]) != digest(floats[1])
    for seed in (0, 1):
        assert started_from("quantized", start("quantized", seed, "init_from=float")) == digest(floats[seed])
    line = command(train, *TINY, f"paths.runs={tmp_path}", "init_from=float", "seed=2").refusal()
    names = ", ".join(sorted(f"float/{run}" for run in floats))
    assert line == f"error: init_from=float has several finished runs, none with seed=2: name one of {names}"
