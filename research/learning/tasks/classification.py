"""Classification: images and integer labels, cross-entropy, accuracy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from research.learning.evaluation import Network
from research.learning.tasks.base import Task


class Classification(Task):
    """Cross-entropy on batches ``(images (N, C, H, W), labels (N,))``.

    Args:
        num_classes: number of classes.
        label_smoothing: weight of the uniform distribution in the targets, 0 to below 1.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"task.label_smoothing={label_smoothing}: use a number from 0 to below 1")
        self.num_classes = num_classes
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def evaluate(self, net: Network, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) in float32 and the mean cross-entropy."""
        images, labels = batch
        logits = net(images).float()
        return logits, self.criterion(logits, labels)

    def metrics(self, prefix: str) -> MetricCollection:
        """Top-1 accuracy, 0 to 1."""
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        return MetricCollection({"accuracy": accuracy}, prefix=prefix)

    def targets(self, batch: Any) -> Tensor:
        """The labels (N,)."""
        labels: Tensor = batch[1]
        return labels
