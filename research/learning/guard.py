"""Stops a run whose loss is no longer a number, before it reaches the weights or a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from research.runs.checkpoint import LAST


class NonFiniteGuard(Callback):
    """Raises ValueError, naming the step, when the loss or a parameter is NaN or infinite.

    On the CPU the loss of every step is checked before its backward pass. On an accelerator a check would wait for the
    device, so the first bad step is remembered there and looked up every ``every_n_steps`` and before any checkpoint is
    written. What the latest step made of the parameters is checked before a checkpoint is written.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check or remember."""
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                raise ValueError(_message("the loss", trainer.global_step, trainer))
            return
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.long, device=loss.device)
        bad = ~torch.isfinite(loss.detach())
        self._first_bad = torch.where(bad & (self._first_bad < 0), trainer.global_step, self._first_bad)
        if trainer.global_step % self.every_n_steps == 0:
            self.check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never save a state behind a bad step."""
        self.check(trainer)
        for name, parameter in pl_module.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(_message(name, trainer.global_step - 1, trainer))

    def check(self, trainer: pl.Trainer) -> None:
        """Raise if a bad step was seen."""
        if self._first_bad is not None and int(self._first_bad) >= 0:
            raise ValueError(_message("the loss", int(self._first_bad), trainer))


def _message(what: str, step: int, trainer: pl.Trainer) -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / LAST
    kept = f"the last good state is kept in {last}" if last.exists() else "no checkpoint had been due before"
    return f"{what} is not finite at step {step}; {kept}; try a smaller optimizer.lr or trainer.gradient_clip_val=1.0"
