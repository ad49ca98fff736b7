"""When a meter looks: after every n-th epoch."""

from __future__ import annotations

import lightning.pytorch as pl


def check_every(slug: str, option: str, value: int) -> None:
    """Raise ValueError unless ``value`` of ``callbacks.<slug>.<option>`` is a number of epochs or steps."""
    if value < 1:
        raise ValueError(f"callbacks.{slug}.{option}={value}: use 1 or more")


def due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether a meter looks at the end of the present epoch: after epochs n, 2n, ... counted from 1."""
    return (trainer.current_epoch + 1) % every_n_epochs == 0
