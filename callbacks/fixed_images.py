"""The images that a meter looks at: the same ones at every look, on every rank and with every seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from research.curvature.batches import FixedBatches

if TYPE_CHECKING:
    from research.learning.module import QuantModule


def fixed_images(trainer: pl.Trainer, module: QuantModule, slug: str, images: int, batch_size: int) -> FixedBatches:
    """``images`` training images without augmentation, where the network is and in its dtype.

    Raises:
        ValueError: the training part has fewer, naming the options of ``callbacks.<slug>``.
    """
    source: Any = trainer.datamodule  # type: ignore[attr-defined]
    try:
        batches = FixedBatches.of(source, images, batch_size)
    except ValueError as error:
        raise ValueError(f"callbacks.{slug}.{error}") from error
    return batches.to(module.device, module.network_dtype)
