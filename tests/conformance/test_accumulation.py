"""Every mechanic under gradient accumulation: steps counted once, and a crash between two accumulated batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from research.learning.module import QuantModule
from research.runs.checkpoint import load_checkpoint
from tests.conformance.registry import MECHANICS
from tests.learning.tiny import LAST, differences, fit, float_weights, make_data, make_module, tiny_net

MODEL = tiny_net(dropout=0.25)
ACCUMULATE, STEPS = 2, 3
IN_A_WINDOW = ACCUMULATE * STEPS - 1


class StopBefore(pl.Callback):
    """Ends the fit by an exception in front of a batch, as a crash would."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise RuntimeError("stopped")


def train(module: QuantModule, folder: Path, **options: Any) -> list[int]:
    """Fit one epoch of three steps with a checkpoint at the second; the steps after which ``after_step`` was called."""
    (mechanic,) = module.active
    after_step, steps = mechanic.after_step, []

    def counted(host: QuantModule) -> None:
        steps.append(host.progress.step)
        after_step(host)

    mechanic.after_step = counted  # type: ignore[method-assign]
    data = make_data(options={"train": 8 + 8 * ACCUMULATE * STEPS, "test": 16})
    fit(module, data, folder, max_epochs=1, accumulate_grad_batches=ACCUMULATE, limit_val_batches=0, **options)
    return steps


@pytest.mark.parametrize("name", MECHANICS)
def test_accumulated_batches_make_one_step_and_survive_a_crash_among_them(name: str, tmp_path: Path) -> None:
    weights = float_weights(tmp_path / "float.safetensors", MODEL)
    settings: dict[str, Any] = {**MECHANICS[name].settings, "model": MODEL, "checkpoint": weights}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(make_module(**settings), whole) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="stopped"):
        train(make_module(**settings), parts, callbacks=(StopBefore(IN_A_WINDOW),))
    assert load_checkpoint(parts / LAST)["global_step"] == 2
    pl.seed_everything(99, verbose=False)
    assert train(make_module(**settings), parts, resume=parts / LAST) == [3]
    assert differences(load_checkpoint(whole / LAST), load_checkpoint(parts / LAST)) == []
