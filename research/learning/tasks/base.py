"""The Task interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from research.learning.evaluation import Network


class Task(nn.Module):
    """How a batch becomes a loss. Built from plain arguments; holds no data and no network."""

    def evaluate(self, net: Network, batch: Any) -> tuple[Any, Tensor]:
        """``(outputs, loss)`` of the network on a batch; the loss is a float32 scalar, a mean over the batch."""
        raise NotImplementedError

    def metrics(self, prefix: str) -> MetricCollection:
        """Fresh metrics, updated by ``update(outputs, targets)``."""
        raise NotImplementedError

    def targets(self, batch: Any) -> Tensor:
        """The part of the batch that the metrics compare the outputs with."""
        raise NotImplementedError
