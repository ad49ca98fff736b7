"""The meter of occupancy: how weights and inputs are spread over their codes, measured without changing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.cadence import check_every, due
from callbacks.fixed_images import fixed_images
from callbacks.oscillation.frozen import used_codes
from callbacks.oscillation.tracker import tracked_layers
from research.learning.mechanic import Mechanic
from research.quant.grid import KINDS
from research.quant.layers import quant_layers
from research.quant.occupancy import Occupancy, occupancy
from research.quant.quantizers.base import Quantizer
from research.runs.logger import written_folders
from research.runs.records import MetricsRecord

if TYPE_CHECKING:
    from research.learning.module import QuantModule

RECORD = "occupancy.csv"
"""In the run folder: the columns of ``metrics.csv``, a row per code, named ``<layer>.<weight or input>/<code>``."""


class BinOccupancy(Mechanic):
    """Logs entropy and clipped share of every layer's codes; all shares go to `RECORD`. Training is as without.

    Logged under ``bin_occupancy/<layer>.weight/`` (and ``.input/``): ``entropy`` in bits, ``entropy_ratio`` as a part
    of that of evenly used codes, ``clipped``; see `research.quant.occupancy`. Frozen codes count as what they are.

    Args:
        every_n_epochs: look after epochs n, 2n, ...
        images: fixed training images, without augmentation, on which inputs are looked at too, in evaluation mode; 0:
            weights only.
        max_bits: wider weights and inputs are left out.
    """

    slug = "bin_occupancy"

    def __init__(self, every_n_epochs: int = 1, images: int = 0, max_bits: int = 8) -> None:
        check_every(self.slug, "every_n_epochs", every_n_epochs)
        if images < 0:
            raise ValueError(f"callbacks.{self.slug}.images={images}: use 0 or more")
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.max_bits = max_bits
        self.inputs: Tensor | None = None

    def attach(self, module: QuantModule) -> None:
        """Refuse a network without a layer to look at."""
        tracked_layers(module.net, self.slug, self.max_bits, KINDS)

    def look(self, module: QuantModule, images: Tensor | None = None) -> dict[str, Occupancy]:
        """Occupancies by layer and tensor (``conv1.weight``), of a copy of the network in evaluation mode.

        Args:
            module: the host.
            images: network inputs (N, ...); None: weights only.
        """
        net = module.plain_copy()
        found = {}
        for name, layer in tracked_layers(net, self.slug, self.max_bits, KINDS).items():
            assert layer.weight_quantizer is not None
            codes = used_codes(layer)  # first: the scale of some quantizers follows from the weight
            found[f"{name}.weight"] = occupancy(layer.weight_quantizer, layer.float_weight(), codes)
        return found if images is None else {**found, **_input_occupancies(net, images, self.max_bits)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the images; drop what a killed run wrote behind its last checkpoint."""
        if self.images:
            ((self.inputs, _),) = fixed_images(trainer, self.module, self.slug, self.images, self.images)
        for folder in written_folders(trainer):
            record = MetricsRecord(folder / RECORD)
            record.truncate_after(trainer.global_step - 1)
            record.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, log and write."""
        if not due(trainer, self.every_n_epochs):
            return
        found: dict[str, Occupancy] = trainer.strategy.broadcast(self.look(self.module, self.inputs))
        for name, each in found.items():
            numbers = {"entropy": each.entropy, "entropy_ratio": each.entropy_ratio, "clipped": each.clipped}
            pl_module.log_dict({f"{self.slug}/{name}/{key}": value for key, value in numbers.items()})
        for folder in written_folders(trainer):
            record = MetricsRecord(folder / RECORD)
            shares = {f"{name}/{code}": share for name, each in found.items() for code, share in each.shares.items()}
            record.append(trainer.global_step - 1, trainer.current_epoch, shares)
            record.close()


@torch.no_grad()
def _input_occupancies(net: nn.Module, images: Tensor, max_bits: int) -> dict[str, Occupancy]:
    """Of all quantized inputs of ``net``, in evaluation mode and a throw-away copy."""
    found: dict[str, Occupancy] = {}

    def looking(name: str) -> Callable[[Quantizer, tuple[Tensor, ...]], None]:
        def look(quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
            found[f"{name}.input"] = occupancy(quantizer, inputs[0], quantizer.codes(inputs[0]))

        return look

    for name, layer in quant_layers(net):
        quantizer = layer.input_quantizer
        if quantizer is not None and float(quantizer.bits.max()) <= max_bits:
            quantizer.register_forward_pre_hook(looking(name))
    net(images)
    return found
