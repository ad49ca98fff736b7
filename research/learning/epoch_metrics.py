"""Mean loss and metrics of an epoch's training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

COUNTED_TOGETHER = 20
"""Steps that are counted in one go: an update of a metric takes as long as a layer of a small network."""


class MeanLoss(Metric):
    """Mean of losses, over all processes; summed in double precision, so that their order does not count."""

    total: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("steps", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum", persistent=True)

    def update(self, losses: Tensor) -> None:
        """Count some more, (N,)."""
        self.total += losses.double().sum()
        self.steps += len(losses)

    def compute(self) -> Tensor:
        """The mean, float32."""
        return (self.total / self.steps).float()


class EpochMetrics(nn.Module):
    """Counts steps, many at a time; part of a checkpoint, wherever in an epoch that is taken.

    Args:
        metrics: of the outputs and targets.
    """

    def __init__(self, metrics: MetricCollection) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.metrics = metrics
        for metric in metrics.values(copy_state=False):
            metric.persistent(True)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.register_state_dict_pre_hook(lambda module, *_: module.count())  # type: ignore[no-untyped-call]

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """One step: its loss (0-dim), outputs (N, ...) and targets (N, ...)."""
        self._waiting.append((loss.detach(), outputs.detach(), targets))
        if len(self._waiting) == COUNTED_TOGETHER:
            self.count()

    def count(self) -> None:
        """Count the steps that wait for it."""
        if self._waiting:
            losses, outputs, targets = zip(*self._waiting, strict=True)
            self._waiting.clear()
            self.loss.update(torch.stack(losses))
            self.metrics.update(torch.cat(outputs), torch.cat(targets))

    def compute(self) -> dict[str, Any]:
        """``train/loss`` and the metrics by name, over all processes."""
        self.count()
        return {"train/loss": self.loss.compute(), **self.metrics.compute()}

    def reset(self) -> None:
        """Begin again."""
        self._waiting.clear()
        self.loss.reset()
        self.metrics.reset()
