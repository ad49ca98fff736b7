"""One more mechanic is new files alone: in a folder of one's own, by the real command, through a crash and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.config import build_module
from research.runs.checkpoint import load_checkpoint
from research.runs.records import read_config, read_metrics
from research.train import main as train
from tests.conformance.registry import CONF
from tests.learning.tiny import LAST
from tests.test_bad_input import STEPS_PER_EPOCH, TINY, command, run_folder

STEPS = 2 * STEPS_PER_EPOCH
CODE = """
import os

import torch

from research.learning.mechanic import Mechanic


class Pull(Mechanic):
    slug = "pull"

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def attach(self, module):
        state = torch.nn.Module()
        state.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        module.mechanics[self.slug] = state

    def loss_terms(self, evaluation):
        return {"pull": self.strength * evaluation.outputs.square().mean()}

    def after_step(self, module):
        module.mechanics[self.slug].steps += 1
        if str(module.progress.step) == os.environ.get("CRASH_AFTER"):
            raise ValueError("crashed")
"""


@pytest.mark.slow
def test_a_mechanic_of_ones_own_is_chosen_from_the_command_line_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_ideas.py").write_text(CODE)
    (tmp_path / "conf/callbacks").mkdir(parents=True)
    (tmp_path / "conf/callbacks/pull.yaml").write_text("pull:\n  _target_: my_ideas.Pull\n  strength: 0.5\n")

    overrides = [f"hydra.searchpath=[file://{tmp_path}/conf]", "callbacks=[pull,sam]", "callbacks.pull.strength=2.0"]
    overrides += [*TINY, "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2"]
    overrides += [f"paths.runs={tmp_path}/runs"]

    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        here.setenv("CRASH_AFTER", str(STEPS - 1))
        assert command(train, *overrides).refusal() == "error: crashed"
    folder = run_folder(tmp_path / "runs")
    assert not (folder / "summary.json").exists()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "research.train", *overrides]
    resumed = subprocess.run(line, cwd=CONF.parent, env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0 and "resuming from last.ckpt" in resumed.stdout, resumed.stderr

    assert json.loads((folder / "summary.json").read_text())["mechanics"] == ["pull", "sam"]
    assert load_checkpoint(folder / LAST)["state_dict"]["mechanics.pull.steps"].tolist() == [STEPS]
    pulls = [row for row in read_metrics(folder / "metrics.csv") if row.name == "train/step/pull"]
    assert [row.step for row in pulls] == list(range(STEPS))
    assert all(row.value > 0 for row in pulls)

    config = {**read_config(folder / "config.yaml"), "paths": {}}
    assert config["callbacks"]["pull"] == {"_target_": "my_ideas.Pull", "strength": 2.0}
    with pytest.raises(ValueError, match="my_ideas.Pull is refused"):
        build_module(config, trusted=False)
