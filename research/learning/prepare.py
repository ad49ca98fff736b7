"""What a fresh run does before its first step: pretrained weights, range calibration, mechanics' preparation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from research.learning.module import QuantModule
from research.quant.batchnorm import fold_pairs
from research.quant.calibrate import calibrate
from research.quant.layers import quantizers
from research.quant.widths import SwitchableBatchNorm2d

log = logging.getLogger(__name__)


@torch.no_grad()
def copy_float_state(source: nn.Module, net: nn.Module) -> None:
    """Copy all parameters and buffers of the float network ``source`` into the converted ``net``, in place.

    Quantizer state is left alone; a switchable batch-norm gets the same copy for every width.

    Raises:
        ValueError: ``net`` lacks a tensor of ``source``.
    """
    target = dict(net.named_parameters()) | dict(net.named_buffers())
    switchable = {name: module for name, module in net.named_modules() if isinstance(module, SwitchableBatchNorm2d)}
    for name, tensor in source.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        widths = switchable[owner].by_width if owner in switchable else ()
        names = [f"{owner}.by_width.{width}.{leaf}" for width in widths] or [name]
        for each in names:
            if each not in target:
                raise ValueError(f"init_from: the quantized network has no tensor {each}: check quantizer.replace")
            target[each].copy_(tensor)


class Preparation(Callback):
    """Prepares a fresh run in ``on_fit_start``: after device placement, before the first step, never on a resume.

    Args:
        batches: number of calibration batches, the same on every rank.
        batch_size: images in each.
    """

    def __init__(self, batches: int, batch_size: int) -> None:
        if batches < 1 or batch_size < 1:
            raise ValueError(f"calibration={{batches: {batches}, batch_size: {batch_size}}}: use 1 or more of both")
        self.batches = batches
        self.batch_size = batch_size

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the host unless its ``prepared`` buffer says that this has been done."""
        assert isinstance(pl_module, QuantModule)
        if bool(pl_module.prepared):
            return
        if pl_module.checkpoint is not None:
            source = pl_module.initial_network()
            if pl_module.recipe.fold_bn == 0:
                fold_pairs(source, source.structure().conv_bn)
            copy_float_state(source, pl_module.net)
            log.info("float weights from %s", pl_module.checkpoint.name)
        data = self.calibration_data(trainer)
        if any(True for _ in quantizers(pl_module.net)):
            calibrate(pl_module.net, pl_module.placed([x for x, _ in data]))
            log.info("ranges calibrated on %d images", sum(len(y) for _, y in data))
        for mechanic in pl_module.active:
            mechanic.prepare(pl_module, data)
        pl_module.prepared.fill_(True)

    def calibration_data(self, trainer: pl.Trainer) -> Sequence[tuple[Tensor, Tensor]]:
        """Un-augmented training batches, fixed by the seed, the same on every rank."""
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches: Sequence[tuple[Tensor, Tensor]] = source.calibration_batches(self.batches, self.batch_size)
        return batches
