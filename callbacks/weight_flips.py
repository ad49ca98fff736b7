"""The meter of flips: how many weights have another code than at the last look, measured without changing anything."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.cadence import check_every, due
from callbacks.oscillation.frozen import used_codes
from callbacks.oscillation.tracker import tracked_layers
from research.learning.mechanic import Mechanic
from research.quant.grid import KINDS
from research.quant.layers import QuantLayer
from research.quant.passes import rebound

if TYPE_CHECKING:
    from research.learning.module import QuantModule

ALL = "all"


def read_codes(layer: QuantLayer) -> Tensor:
    """`used_codes` by a copy of the quantizer: some quantizers keep a scale of the weights whose codes they gave."""
    with rebound(layer, "weight_quantizer", copy.deepcopy(layer.weight_quantizer)):
        return used_codes(layer)


class LastCodes(nn.Module):
    """Codes of a layer at the last look, and the width they were taken at, as buffers.

    Args:
        weight: the latent weight, for its shape.
        bits: the width.
    """

    codes: Tensor
    bits: Tensor

    def __init__(self, weight: Tensor, bits: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(weight.shape, dtype=torch.int16, device=weight.device))
        self.register_buffer("bits", bits.detach().clone())

    def look(self, codes: Tensor, bits: Tensor) -> int | None:
        """How many codes are others than at the last look, None at another width; keeps ``codes`` for the next."""
        same_width = torch.equal(bits, self.bits)
        flips = int((codes != self.codes).sum())
        self.codes.copy_(codes)
        self.bits.copy_(bits)
        return flips if same_width else None


class WeightFlips(Mechanic):
    """Logs the share of weights whose code is another than at the last look; training is what it is without.

    The first look is at the codes that the run starts with. Logged as ``weight_flips/<layer>`` and, over all weights
    together, ``weight_flips/all``; a layer whose width has changed in between is left out once.

    Args:
        every_n_epochs: look after epochs n, 2n, ...
        every_n_steps: look after every n-th optimizer step instead; None: by epochs.
        max_bits: layers with wider weights are left out.
    """

    slug = "weight_flips"

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None, max_bits: int = 8) -> None:
        check_every(self.slug, "every_n_epochs", every_n_epochs)
        if every_n_steps is not None:
            check_every(self.slug, "every_n_steps", every_n_steps)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.max_bits = max_bits
        self.layers: dict[str, QuantLayer] = {}
        self.last: dict[str, LastCodes] = {}

    def attach(self, module: QuantModule) -> None:
        """Find the layers and register their last codes, dots of their names written as dashes."""
        self.layers = tracked_layers(module.net, self.slug, self.max_bits, KINDS)
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            self.last[name] = LastCodes(layer.weight, layer.weight_quantizer.bits)
        module.mechanics[self.slug] = nn.ModuleDict({name.replace(".", "-"): last for name, last in self.last.items()})

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """The first look."""
        self.look()

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Shares of flipped weights since the last look, 0 to 1, by the name they are logged under."""
        shares, flipped, weights = {}, 0, 0
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            flips = self.last[name].look(read_codes(layer), layer.weight_quantizer.bits)
            if flips is not None:
                shares[f"{self.slug}/{name}"] = flips / layer.weight.numel()
                flipped, weights = flipped + flips, weights + layer.weight.numel()
        return {**shares, f"{self.slug}/{ALL}": flipped / weights} if weights else {}

    def after_step(self, module: QuantModule) -> None:
        """With ``every_n_steps``: look, and hand the shares to the loggers at once, as metrics of this step."""
        if self.every_n_steps is None or module.progress.step % self.every_n_steps:
            return
        shares = {**self.look(), "epoch": module.progress.epoch}
        for logger in module.loggers:
            logger.log_metrics(shares, step=module.progress.step - 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without ``every_n_steps``: look and log."""
        if self.every_n_steps is None and due(trainer, self.every_n_epochs):
            pl_module.log_dict(self.look())
