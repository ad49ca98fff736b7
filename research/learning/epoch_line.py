"""Progress without a progress bar: a line for every epoch, for logs and pipes."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from research.learning.module import QuantModule

log = logging.getLogger(__name__)


class EpochLine(Callback):
    """Logs, at the end of each epoch, what the bar would show: epoch, step and the latest validation metrics."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line, on the first rank only."""
        assert isinstance(pl_module, QuantModule)
        if trainer.is_global_zero:
            metrics = [f"{name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items()]
            steps = f"step {trainer.global_step}/{pl_module.progress.total}"
            log.info("epoch %d, %s", trainer.current_epoch + 1, ", ".join([steps, *metrics]))
