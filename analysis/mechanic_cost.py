"""What every mechanic costs: ``python -m analysis.mechanic_cost [output=FILE] [compile=network] [only=SLUG,SLUG]``.

Each mechanic of conf/callbacks trains a ResNet-20 on synthetic images for a few steps, with its own settings and the
quantizer it is made for, in turn with the same network without mechanics, several rounds: the ratios of the median step
times and of what the graphs keep for their backward passes, and how often a step runs the network. Processor time of
one thread: other work on the machine counts little.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

from analysis.benchmark.saved import SavedMemory
from analysis.cli import script
from analysis.mechanics import entries, train_configs
from analysis.train_config import train_config
from research.learning.module import QuantModule
from research.learning.prepare import Preparation
from research.results import hardware
from research.runs.environment import snapshot
from research.runs.files import atomic_write_text
from research.train import build

PLAIN = ""
WARMUP = 2
SEARCH = 64
"""Images held out for mechanics that search on them."""


class StepTimes(Callback):
    """Processor seconds of every training step but the first ``warmup``, how often the last one ran the network, and
    the most bytes that the graphs of the last step before kept at a time.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.seconds: list[float] = []
        self.forwards = self.kept_bytes = self._running = 0
        self.saved: SavedMemory | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the network's forward passes."""
        assert isinstance(pl_module, QuantModule)
        pl_module.net.register_forward_pre_hook(self.count)

    def count(self, *arguments: Any) -> None:
        """One more forward pass."""
        self._running += 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Start the clock, or the count of bytes."""
        self._running = 0
        if trainer.global_step == self.warmup - 1:
            self.saved = SavedMemory(pl_module.parameters())
            self.saved.__enter__()
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Stop what was started; what a mechanic does at the end of an epoch is not part of a step."""
        self.forwards = self._running
        if self.saved is not None:
            self.saved.__exit__(None, None, None)
            self.kept_bytes, self.saved = self.saved.peak, None
        elif trainer.global_step > self.warmup:
            self.seconds.append(time.process_time() - self.start)


@dataclass
class Cost:
    """Measurements of one mechanic beside plain training with the same quantizer."""

    ratios: list[float] = field(default_factory=list)
    forwards: int = 0
    memory: float = 1.0


def config_of(model: str, quantizer: str, mechanic: str, steps: int, batch_size: int, compiled: str) -> dict[str, Any]:
    """A plain training config: W4A4, synthetic images of CIFAR's size."""
    images = steps * batch_size + 256 + SEARCH
    overrides = [
        f"model={model}",
        "data=synthetic",
        f"quantizer={quantizer}",
        f"callbacks=[{mechanic}]",
        "data.image_size=32",
        "data.validation=0",
        f"data.search={SEARCH}",
        f"data.batch_size={batch_size}",
        f"data.options={{train: {images}, test: 16}}",
        f"compile={compiled}",
    ]
    if mechanic == "hero":
        overrides.append("callbacks.hero.warmup_epochs=0")  # what a step costs once the penalty acts
    return train_config(overrides)


def step_times(config: dict[str, Any], checkpoint: Path, steps: int, warmup: int) -> StepTimes:
    """Train a few steps."""
    data, module = build(config)
    if not checkpoint.exists():
        save_file(
            {name: tensor.contiguous() for name, tensor in module.float_network().state_dict().items()}, checkpoint
        )
    module.checkpoint = checkpoint
    times = StepTimes(warmup)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[Preparation(batches=1, batch_size=64), times],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return times


def measure(
    model: str, rounds: int, steps: int, warmup: int, batch_size: int, compiled: str, only: Sequence[str] = ()
) -> dict[str, Cost]:
    """The cost of every mechanic by slug, with LSQ if it goes with that; compiled, of those that can be."""
    every = [entry for entry in entries(train_configs()) if not only or entry.slug in only]
    found = [entry for entry in every if compiled == "none" or not entry.mechanic.needs_double_backward]
    costs = {entry.slug: Cost() for entry in found}
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "float.safetensors"
        for _ in range(rounds):
            for entry in found:
                quantizer = "lsq" if "lsq" in entry.quantizers else entry.quantizers[0]
                without, times = (
                    step_times(
                        config_of(model, quantizer, mechanic, steps, batch_size, compiled), checkpoint, steps, warmup
                    )
                    for mechanic in (PLAIN, entry.slug)
                )
                cost = costs[entry.slug]
                cost.ratios.append(median(times.seconds) / median(without.seconds))
                cost.forwards = times.forwards
                cost.memory = times.kept_bytes / without.kept_bytes
    return costs


def main(
    output: str | None, compile: str, model: str, only: str | None, rounds: int, steps: int, batch_size: int
) -> None:
    """Measure, print, and write a record if asked to.

    Args:
        output: JSON file to write.
        compile: ``none`` or ``network``.
        model: of conf/model.
        only: slugs, separated by commas; None measures all.
        rounds: how often each mechanic is measured, in turn with the others.
        steps: optimizer steps of each measurement, two of them to warm up.
        batch_size: images a step.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a fit's greetings, once per mechanic and round
    costs = measure(model, rounds, steps, WARMUP, batch_size, compile, only.split(",") if only else ())
    if not costs:
        raise ValueError(f"only={only}: no mechanic of conf/callbacks that compile={compile} can measure")
    record = {
        "network": f"{model}, W4A4, float32, synthetic 32x32 images",
        "compile": compile,
        "batch_size": batch_size,
        "threads": 1,
        "hardware": hardware(snapshot(), "cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mechanics": {
            slug: {
                "forwards": cost.forwards,
                "ratio": round(median(cost.ratios), 2),
                "memory": round(cost.memory, 2),
                "ratios": cost.ratios,
            }
            for slug, cost in costs.items()
        },
    }
    for slug, cost in costs.items():
        low, middle, high = min(cost.ratios), median(cost.ratios), max(cost.ratios)
        print(f"{slug:24} {cost.forwards} forward, {middle:.2f} x ({low:.2f} - {high:.2f}), memory {cost.memory:.2f} x")
    if output is not None:
        atomic_write_text(Path(output), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    script(
        main,
        {
            "output": None,
            "compile": "none",
            "model": "resnet20",
            "only": None,
            "rounds": 3,
            "steps": 6,
            "batch_size": 128,
        },
    )
