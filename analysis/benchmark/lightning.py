"""What a step costs besides the network: our host with a tiny MLP beside plain Lightning, Fabric, a loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from analysis.benchmark.interleaved import Clock, clock_of
from analysis.train_config import train_config
from research.models.structure import FloatModel, Structure
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from research.settings import PRECISIONS
from research.train import build, build_trainer

HAND = "loop by hand"


class Mlp(FloatModel):
    """Two linear layers on 16x16 colour images."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten(1)
        self.fc1 = nn.Linear(3 * 16 * 16, 32)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(32, 10)

    def structure(self) -> Structure:
        """No blocks, no norms."""
        return Structure(blocks=(), conv_bn=(), first="fc1", last="fc2")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        y: Tensor = self.fc2(self.relu(self.fc1(self.flatten(x))))
        return y


def config_of(batches: int) -> dict[str, Any]:
    """A float run of one epoch, its metrics written to CSV as always."""
    overrides = [
        "data=synthetic",
        "quantizer=float",
        "trainer.max_epochs=1",
        "data.validation=0",
        f"data.options={{train: {64 * batches}, test: 16}}",
        "logger.wandb.mode=disabled",
    ]
    return {**train_config(overrides), "model": {"_target_": "analysis.benchmark.lightning.Mlp"}}


class Plain(pl.LightningModule):
    """The same network as Lightning's own pages would train it, its loss logged on the steps that loggers write."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD and its schedule, as in the loop by hand."""
        optimizer, schedule = _optimizer(self.net, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Clock(pl.Callback):
    """Time between the first counted batch and the last."""

    def __init__(self, first: int, now: Callable[[], float]) -> None:
        self.first, self.now = first, now
        self.steps, self.start, self.end = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Start with the first counted batch."""
        self.steps, self.end = index - self.first, self.now()
        if index == self.first:
            self.start = self.end

    @property
    def seconds(self) -> float:
        """A step."""
        return (self.end - self.start) / self.steps


def host_seconds(config: dict[str, Any], first: int, now: Callable[[], float]) -> float:
    """Seconds a step of our training, but for the ``first`` steps."""
    with TemporaryDirectory() as place:
        folder = RunFolder.of(place, "overhead", config)
        folder.path.mkdir(parents=True)
        data, module = build(config)
        trainer = build_trainer(config, folder, [RunLogger(folder)])
        clock = _Clock(first, now)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    return clock.seconds


def plain_seconds(config: dict[str, Any], first: int, now: Callable[[], float]) -> float:
    """The same of a plain LightningModule, with the same flags of the Trainer and Lightning's own CSV logger."""
    settings = {**config["trainer"], "precision": PRECISIONS[str(config["trainer"]["precision"])]}
    with TemporaryDirectory() as place:
        data, module = build(config)
        clock = _Clock(first, now)
        trainer = pl.Trainer(
            **{**settings, "enable_progress_bar": False},
            logger=CSVLogger(place),
            callbacks=[clock],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=place,
        )
        trainer.fit(Plain(module.float_network()), datamodule=data)
    return clock.seconds


def loop_seconds(config: dict[str, Any], first: int, now: Callable[[], float], fabric: Fabric | None = None) -> float:
    """The same of the loop anybody would write, with a CSV line every 20 steps; with Fabric or without."""
    data, module = build(config)
    loader, start = data.train_dataloader(), 0.0
    net = module.float_network().train()
    optimizer, schedule = _optimizer(net, len(loader))
    run: Any = net
    if fabric is not None:
        run, optimizer = fabric.setup(net, optimizer)
    with TemporaryDirectory() as place, (Path(place) / "log.csv").open("w") as log:
        for index, (images, labels) in enumerate(loader):
            if index == first:
                start = now()
            loss = nn.functional.cross_entropy(run(images), labels)
            optimizer.zero_grad()
            if fabric is None:
                loss.backward()
            else:
                fabric.backward(loss)
            optimizer.step()
            schedule.step()
            if index % 20 == 0:
                log.write(f"{index},{loss.item()}\n")
        return (now() - start) / (len(loader) - first)


def _optimizer(net: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Those of our default configuration."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def measure(rounds: int, batches: int, clock: Clock) -> dict[str, Any]:
    """By loop: ``us`` a step (median of interleaved rounds) and ``above_us``, above the loop by hand."""
    config, first = config_of(batches), batches // 5
    now = clock_of(clock)
    fabric = Fabric(accelerator="cpu", devices=1)
    loops: dict[str, Callable[[], float]] = {
        HAND: lambda: loop_seconds(config, first, now),
        "Fabric": lambda: loop_seconds(config, first, now, fabric),
        "plain LightningModule": lambda: plain_seconds(config, first, now),
        "flatbit": lambda: host_seconds(config, first, now),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop())
    found = {name: 1e6 * median(values) for name, values in seconds.items()}
    return {name: {"us": value, "above_us": value - found[HAND]} for name, value in found.items()}
