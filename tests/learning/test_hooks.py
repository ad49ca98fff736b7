"""Hooks that a callback or the module does not define are not called, and all others are."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler

from research.learning.hooks import PER_BATCH, skip_empty_hooks
from tests.learning.tiny import fit, make_module


class Counting(Callback):
    """Defines one hook of a step, and one of an epoch."""

    def __init__(self) -> None:
        self.batches = self.epochs = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.batches += 1

    def on_train_epoch_end(self, *arguments: Any) -> None:
        self.epochs += 1


def test_only_hooks_with_something_to_do_are_called() -> None:
    counting, profiler = Counting(), SimpleProfiler()
    skip_empty_hooks([counting])
    trainer = fit(make_module(), callbacks=(counting,), profiler=profiler)
    assert (counting.batches, counting.epochs) == (trainer.global_step, 2)
    own = {action.rpartition(".")[2] for action in profiler.recorded_durations if "Counting" in action}
    assert own & set(PER_BATCH) == {"on_train_batch_end"}
    assert "on_train_epoch_end" in own
    module = {action.rpartition(".")[2] for action in profiler.recorded_durations if "[LightningModule]" in action}
    assert module & set(PER_BATCH) == {"on_train_batch_start"}
