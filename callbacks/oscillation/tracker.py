"""The meter of oscillation: which codes of the weights jump back and forth, measured without changing anything."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.cadence import check_every, due
from callbacks.oscillation.frozen import used_codes
from callbacks.oscillation.history import CodeHistory
from research.learning.mechanic import Mechanic
from research.quant.grid import GridKind
from research.quant.layers import QuantLayer, quant_layers
from research.quant.widths import PerWidth

if TYPE_CHECKING:
    from research.learning.module import QuantModule

ORDERED: tuple[GridKind, ...] = ("uniform", "midrise")


class CodeTracking(Mechanic):
    """Tracks the codes of all weights of few bits: once when the run starts, then after every optimizer step.

    Args:
        momentum: m, weight of a step in the averages.
        max_bits: layers with wider weights are left out.

    Attributes:
        layers: the tracked layers by name.
        histories: their state by the same name.
    """

    def __init__(self, momentum: float, max_bits: int) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"callbacks.{self.slug}.momentum={momentum}: use more than 0, up to 1")
        self.momentum = momentum
        self.max_bits = max_bits
        self.layers: dict[str, QuantLayer] = {}
        self.histories: dict[str, Any] = {}

    def history(self, name: str, layer: QuantLayer, bits: Tensor) -> CodeHistory:
        """A new, empty history for a layer."""
        return CodeHistory(layer.weight, bits)

    def attach(self, module: QuantModule) -> None:
        """Find the layers and register their histories, dots of their names written as dashes."""
        self.layers = tracked_layers(module.net, self.slug, self.max_bits)
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            self.histories[name] = self.history(name, layer, layer.weight_quantizer.bits)
        module.mechanics[self.slug] = nn.ModuleDict(
            {name.replace(".", "-"): history for name, history in self.histories.items()}
        )

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Take the codes that the run starts with."""
        for name, layer in self.layers.items():
            self.histories[name].begin(used_codes(layer))

    @torch.no_grad()
    def after_step(self, module: QuantModule) -> None:
        """Look at the codes that the next step will use."""
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            self.histories[name].look(used_codes(layer), layer.weight_quantizer.bits, self.momentum)

    def fraction(self, buffer: str, above: float = 0.0) -> Tensor:
        """The share of all tracked weights whose ``buffer`` is greater than ``above``; 0-dim."""
        values = [getattr(history, buffer) for history in self.histories.values()]
        counts = torch.stack([(value > above).sum() for value in values])
        fraction: Tensor = counts.sum() / sum(value.numel() for value in values)
        return fraction


class OscillationTracker(CodeTracking):
    """Logs the fraction of oscillating weights every few epochs; training is what it is without, bit for bit.

    Args:
        momentum: m of the frequency.
        limit: a weight oscillates if its frequency is greater.
        max_bits: layers with wider weights are left out.
        every_n_epochs: log after epochs n, 2n, ...; the codes are looked at after every step all the same.
    """

    slug = "oscillation_tracker"

    def __init__(
        self, momentum: float = 0.001, limit: float = 0.005, max_bits: int = 4, every_n_epochs: int = 1
    ) -> None:
        super().__init__(momentum, max_bits)
        check_every(self.slug, "every_n_epochs", every_n_epochs)
        if not 0 <= limit < 1:
            raise ValueError(f"callbacks.{self.slug}.limit={limit}: use 0 or more and less than 1")
        self.limit = limit
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the share of weights above the limit, and of those that have ever oscillated."""
        if due(trainer, self.every_n_epochs):
            pl_module.log(f"{self.slug}/oscillating", self.fraction("frequency", self.limit))
            pl_module.log(f"{self.slug}/ever_oscillated", self.fraction("oscillations"))


def tracked_layers(
    net: nn.Module, slug: str, max_bits: int, kinds: Collection[GridKind] = ORDERED
) -> dict[str, QuantLayer]:
    """Layers whose weight has codes of at most ``max_bits`` bits, by name.

    Raises:
        ValueError: there is none, or one whose codes are on a grid of another kind, or of several widths.
    """
    found = {}
    for name, layer in quant_layers(net):
        quantizer = layer.weight_quantizer
        if quantizer is None or float(quantizer.bits.max()) > max_bits:
            continue
        if isinstance(quantizer, PerWidth):
            raise ValueError(f"callbacks.{slug}: {name} has codes at several widths; use quantizer.widths=[]")
        if quantizer.grid.kind not in kinds:
            raise ValueError(
                f"callbacks.{slug}: {name} has codes on a {quantizer.grid.kind} grid; use quantizer=lsq, a uniform one"
            )
        found[name] = layer
    if not found:
        raise ValueError(
            f"callbacks.{slug}.max_bits={max_bits}: no layer has a quantized weight of so few bits; use quantizer=lsq, "
            "or more bits here"
        )
    return found
