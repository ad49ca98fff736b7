"""The data of a curvature measurement: batches made once, the same for every product with the operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from research.curvature.sharpness import Loss, mean_loss
from research.data import ImageDataModule
from research.quant.passes import evaluating

Batch = tuple[Tensor, Tensor]
REPEATABLE = 1e-6
"""Most by which two evaluations of one loss may differ, relatively: what the order of float32 sums may cost."""


@dataclass(frozen=True)
class FixedBatches(Sequence[Batch]):
    """Batches ``(inputs (N, ...), targets (N, ...))`` of any sizes: each counts by its number of samples.

    Attributes:
        batches: the batches themselves.
        settings: where they come from, in plain values, for the record of what is measured on them.
    """

    batches: tuple[Batch, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: ImageDataModule, images: int = 512, batch_size: int = 128) -> FixedBatches:
        """``images`` training images of a data module, not augmented; the same for every seed of the run.

        Raises:
            ValueError: more images than there are.
        """
        batches = tuple(data.measurement_batches(images, batch_size))
        return cls(batches, {"part": "train", "augmented": False, "images": images, "batch_size": batch_size})

    def to(self, device: torch.device, dtype: torch.dtype) -> FixedBatches:
        """The batches on a device, floating-point tensors in ``dtype``."""
        moved = (
            tuple(tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in batch)
            for batch in self.batches
        )
        return FixedBatches(tuple((inputs, targets) for inputs, targets in moved), self.settings)

    @property
    def samples(self) -> int:
        """Number of samples of all batches together."""
        return sum(len(targets) for _, targets in self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Batch, ...]: ...

    def __getitem__(self, index: int | slice) -> Batch | tuple[Batch, ...]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def check_repeatable(net: nn.Module, loss: Loss, batches: Sequence[Any]) -> float:
    """The mean loss of ``net`` in evaluation mode, evaluated twice.

    Raises:
        ValueError: the two values differ or are not finite, or a buffer of ``net`` moved: no operator can be measured.
    """
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with evaluating(net):
        first, second = (mean_loss(net, loss, batches) for _ in range(2))
    if not math.isfinite(first):
        raise ValueError(f"curvature: the loss is {first}, so there is nothing to differentiate; use a trained network")
    if not math.isclose(first, second, rel_tol=REPEATABLE):
        raise ValueError(
            f"curvature: the loss is {first!r}, then {second!r} on the same batches; use a network without noise"
        )
    check_buffers(net, before)
    return first


def check_buffers(net: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming it, for a buffer of ``net`` that is no longer what it was ``before``."""
    for name, buffer in net.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise ValueError(f"curvature: {name} moved during an evaluation; use a network without state in eval mode")
