"""A killed and resumed run ends bit-equal to an uninterrupted one: weights, momentum, schedule, batches, records."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from research.runs.checkpoint import BEST, RunCheckpoint, load_checkpoint
from tests.runs.mini import BATCHES, EPOCHS, train


class Interrupted(Exception):
    pass


class InterruptAt(pl.Callback):
    """Raises in the n-th call of one hook."""

    def __init__(self, hook: str, call: int) -> None:
        self.left = call
        setattr(self, hook, self.count)

    def count(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def outcome(root: Path, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    (run,) = (root / "mini").iterdir()
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "momentum": [s["momentum_buffer"].tolist() for s in trainer.optimizers[0].state_dict()["state"].values()],
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "progress": (trainer.global_step, trainer.current_epoch),
        "metrics": (run / "metrics.csv").read_text(),
        "best": load_checkpoint(run / "checkpoints" / BEST)["global_step"],
    }


CASES = [  # trainer options, every_n_steps, hook that interrupts, its call that interrupts each start of the run
    ({}, None, "on_train_batch_end", [11]),
    ({}, 2, "on_train_batch_start", [5, 4, 6]),
    ({}, 2, "on_validation_batch_end", [3]),
    ({}, 2, "on_train_epoch_start", [2]),
    ({"val_check_interval": 3}, 1, "on_train_batch_start", [4]),
    ({"val_check_interval": 3}, 1, "on_validation_batch_end", [1]),
    ({"val_check_interval": 3}, 1, "on_validation_end", [3]),
    ({"accumulate_grad_batches": 4}, 1, "on_train_batch_start", [8, 2]),
    ({"accumulate_grad_batches": 2, "val_check_interval": 4}, 1, "on_train_batch_start", [6]),
    ({"check_val_every_n_epoch": 2}, 1, "on_train_epoch_end", [1]),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    results = {}
    for options in {str(options): options for options, *_ in CASES}.values():
        root = tmp_path_factory.mktemp("whole")
        trainer, module, loader = train(root, **options)
        assert loader.trace == [(epoch, index) for epoch in range(EPOCHS) for index in range(BATCHES)]
        results[str(options)] = outcome(root, trainer, module)
    return results


@pytest.mark.parametrize(("options", "every", "hook", "calls"), CASES)
def test_resume_is_exact(
    tmp_path: Path,
    uninterrupted: dict[str, Any],
    options: dict[str, Any],
    every: int | None,
    hook: str,
    calls: list[int],
) -> None:
    for call in calls:
        with pytest.raises(Interrupted):
            train(tmp_path, [InterruptAt(hook, call)], every, **options)
    trainer, module, loader = train(tmp_path, every_n_steps=every, **options)
    whole = [(epoch, index) for epoch in range(EPOCHS) for index in range(BATCHES)]
    assert loader.trace == whole[len(whole) - len(loader.trace) :], "batches repeated or skipped after the checkpoint"
    assert len(loader.trace) < len(whole)
    assert outcome(tmp_path, trainer, module) == uninterrupted[str(options)]


def test_sigkill_at_random_steps_is_exact(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    kills = [random.SystemRandom().randrange(BATCHES * EPOCHS // 5 + 1) for _ in range(5)]
    command = [sys.executable, "-m", "tests.runs.mini", str(tmp_path), *map(str, kills)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.split() == ["SIGKILL"] * 5, done.stderr
    trainer, module, _ = train(tmp_path)
    assert outcome(tmp_path, trainer, module) == uninterrupted["{}"], f"killed after {kills} steps"


def test_best_is_the_best_validation_and_its_score_is_state(tmp_path: Path) -> None:
    trainer, _, _ = train(tmp_path)
    (run,) = (tmp_path / "mini").iterdir()
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines() if "val/loss" in line]
    best = min(rows, key=lambda row: float(row[3]))
    assert load_checkpoint(run / "checkpoints" / BEST)["global_step"] == int(best[0]) + 1
    (callback,) = (c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
    assert callback.state_dict() == {"best_score": float(best[3])}


def test_a_monitor_that_nobody_logs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint.monitor=val/accuracy is not logged.*use one of: .*val/loss"):
        train(tmp_path, monitor="val/accuracy")
