"""A small training job with all that a resume has to carry: momentum, schedule, dropout, batch-norm, loader position.

`python -m tests.runs.mini FOLDER STEPS STEPS ...` starts the job in FOLDER once per STEPS, each in a process of its own
that SIGKILL ends in its batch after that many steps, and prints the name of the signal that ended each.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from research.runs.checkpoint import RunCheckpoint, VerifiedCheckpointIO, load_checkpoint, load_newest
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from research.runs.rng import rng_state, set_rng_state

BATCHES, EPOCHS = 6, 3


class CountingLoader:
    """Resumable batches whose content depends on epoch and index, with a trace of what was yielded."""

    def __init__(self) -> None:
        self.epoch = self.position = 0
        self.sampler = self
        self.trace: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < BATCHES:
            self.trace.append((self.epoch, self.position))
            generator = torch.Generator().manual_seed(1000 * self.epoch + self.position)
            self.position += 1
            yield torch.randn(8, 4, generator=generator)


class MiniModule(pl.LightningModule):
    """Regression of a fixed function, with randomness in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )
        self._rng: dict[str, Any] | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch) - batch.sum(1, keepdim=True)).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        torch.manual_seed(1)
        if self._rng is not None:
            set_rng_state(self._rng)


def validation_loader() -> torch.utils.data.DataLoader:  # type: ignore[type-arg]
    points = torch.linspace(-1, 1, 64).reshape(16, 4)
    return torch.utils.data.DataLoader(points, batch_size=8)  # type: ignore[arg-type]


def train(
    root: Path,
    callbacks: list[pl.Callback] | None = None,
    every_n_steps: int | None = 2,
    monitor: str = "val/loss",
    **trainer_options: Any,
) -> tuple[pl.Trainer, MiniModule, CountingLoader]:
    """One start of the job: the first one, or a resume. Returns what is left after it ends."""
    folder = RunFolder.of(root, "mini", {"options": str(trainer_options)})
    logger = RunLogger(folder)
    module, loader = MiniModule(), CountingLoader()
    newest = load_newest(folder.checkpoints)
    steps = load_checkpoint(newest)["global_step"] if newest else 0
    logger.truncate_after(steps - 1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[*(callbacks or []), RunCheckpoint(folder.checkpoints, every_n_steps, monitor, "min")],
        plugins=[VerifiedCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(module, loader, validation_loader(), ckpt_path=newest)
    return trainer, module, loader


class KillAfter(pl.Callback):
    """Ends this process by SIGKILL in the middle of a step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, *arguments: Any) -> None:
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps -= 1


if __name__ == "__main__":
    for steps in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            train(Path(sys.argv[1]), [KillAfter(int(steps))])
            os._exit(0)
        print(signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name, flush=True)
