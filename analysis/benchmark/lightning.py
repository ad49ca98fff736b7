"""What a Lightning step costs besides the network: our host with a tiny MLP beside the same loop by hand."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from research.config import plain
from research.models.structure import FloatModel, Structure
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from research.train import build, build_trainer


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
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        config = plain(compose("train", overrides=overrides))
    config["model"] = {"_target_": "analysis.benchmark.lightning.Mlp"}
    return config


def host_seconds(config: dict[str, Any], batches: int) -> float:
    """Seconds a step of the whole training loop, the first fifth left out."""
    with TemporaryDirectory() as place:
        folder = RunFolder.of(place, "overhead", config)
        folder.path.mkdir(parents=True)
        data, module = build(config)
        trainer = build_trainer(config, folder, [RunLogger(folder)])
        clock = _Clock(batches // 5)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    return clock.seconds / clock.steps


class _Clock(pl.Callback):
    """Time between the first counted batch and the last."""

    def __init__(self, first: int) -> None:
        self.first, self.steps, self.seconds = first, 0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Start with the first counted batch."""
        if index == self.first:
            self.start = time.perf_counter()
        self.steps, self.seconds = index - self.first, time.perf_counter() - getattr(self, "start", 0.0)


def hand_seconds(config: dict[str, Any], batches: int) -> float:
    """Seconds a step of the loop anybody would write: the same data, network and optimizer, a CSV line every 20."""
    data, module = build(config)
    net, optimizer = module.net, torch.optim.SGD(module.net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    loader, first, start = data.train_dataloader(), batches // 5, 0.0
    with TemporaryDirectory() as place, (Path(place) / "log.csv").open("w") as log:
        for index, (images, labels) in enumerate(loader):
            if index == first:
                start = time.perf_counter()
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if index % 20 == 0:
                log.write(f"{index},{loss.item()}\n")
        return (time.perf_counter() - start) / (batches - first)


def measure(rounds: int, batches: int = 500) -> dict[str, Any]:
    """``hand_us`` and ``host_us`` a step (medians of interleaved rounds) and their ``difference_us``."""
    config = config_of(batches)
    seconds: dict[str, list[float]] = {"hand": [], "host": []}
    for _ in range(rounds):
        seconds["hand"].append(hand_seconds(config, batches))
        seconds["host"].append(host_seconds(config, batches))
    hand, host = (1e6 * median(values) for values in seconds.values())
    return {"hand_us": hand, "host_us": host, "difference_us": host - hand}
