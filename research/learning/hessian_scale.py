"""When and on what the Hessian-driven strength of gradient scaling is measured during training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from research.curvature.quantized_tensors import error_gradient_scales
from research.learning.module import QuantModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HessianScale:
    """Measures `error_gradient_scales` of the network in training, every few epochs (EWGS: 10), never before the first.

    The measurement runs in float32 on an eager copy in training mode (batch statistics in batch-norm), on training
    images without augmentation that are the same on every rank: training itself is not disturbed.

    Args:
        key: config key of the owner, for errors.
        every_n_epochs: measure in front of epochs n, 2n, ...
        batches: number of batches.
        batch_size: images in each.
        probes: most Hutchinson probes per batch.
        tolerance: relative change at which probing stops.
    """

    key: str
    every_n_epochs: int = 10
    batches: int = 3
    batch_size: int = 128
    probes: int = 50
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "batches", "batch_size", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.key}.{name}={getattr(self, name)}: use 1 or more")

    def warn_if_never(self, trainer: pl.Trainer) -> None:
        """Say so where the run ends before the first measurement."""
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.every_n_epochs:
            log.warning(
                "%s.every_n_epochs=%d: nothing is measured in %d epochs, the strength stays where it starts; use less "
                "than trainer.max_epochs",
                self.key,
                self.every_n_epochs,
                epochs,
            )

    def measure(self, trainer: pl.Trainer, module: QuantModule, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Strengths by quantizer name, per unit of error, on the device of ``module``; None in the epochs between."""
        epoch = trainer.current_epoch
        if epoch == 0 or epoch % self.every_n_epochs:
            return None
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = [module.placed(batch) for batch in source.calibration_batches(self.batches, self.batch_size)]

        def loss(net: nn.Module, batch: Any) -> Tensor:
            return module.task.evaluate(net, batch)[1]

        net = module.plain_copy().train()
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
            torch.manual_seed(generator.initial_seed())  # of dropout: the same on every rank, and nobody else's
            found = error_gradient_scales(net, loss, batches, generator, self.probes, self.tolerance)
        return {name: scale.to(module.device) for name, scale in found.items()}
