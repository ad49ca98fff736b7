"""Iterative weight freezing: weights that oscillate too often keep their code for good (Nagel et al., ICML 2022)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.oscillation.frozen import FreezableHistory, FreezeTo, FrozenCodes, settle
from callbacks.oscillation.schedule import annealed, check_warmup
from callbacks.oscillation.tracker import CodeTracking
from research.learning.mechanic import Claim
from research.quant.conv_bn import QuantConvBn2d
from research.quant.layers import QuantLayer, quant_layers

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
LEAST_OSCILLATIONS = 2


class OscillationFreezing(CodeTracking):
    """Freezes the code of every weight whose oscillation frequency exceeds a threshold that falls over the run.

    Frozen codes act through the layers' ``weight_override``; the scale goes on learning.

    Args:
        threshold_start: threshold at the end of the warm-up; with both 0 nothing freezes: plain training, bit for bit.
        threshold_final: threshold at the end of the run, along a cosine; the same value is a constant threshold.
        warmup: part of the run in which nothing is frozen.
        momentum: m of the frequency and of the average code.
        freeze_to: ``average``: the code that the weight had most, or ``current``: the one it has.
        max_bits: layers with wider weights are left out.
    """

    slug = "oscillation_freezing"
    claims: frozenset[Claim] = frozenset({"codes", "bits"})

    def __init__(
        self,
        threshold_start: float = 0.1,
        threshold_final: float = 0.01,
        warmup: float = 0.25,
        momentum: float = 0.001,
        freeze_to: FreezeTo = "average",
        max_bits: int = 4,
    ) -> None:
        super().__init__(momentum, max_bits)
        if not 0 <= threshold_final <= threshold_start < 1:
            raise ValueError(
                f"callbacks.{self.slug}: threshold_start={threshold_start}, threshold_final={threshold_final}: use "
                "frequencies from 0 to less than 1, the final one not above the first"
            )
        check_warmup(self.slug, warmup)
        if freeze_to not in get_args(FreezeTo):
            raise ValueError(f"callbacks.{self.slug}.freeze_to={freeze_to}: use one of {', '.join(get_args(FreezeTo))}")
        self.threshold_start = threshold_start
        self.threshold_final = threshold_final
        self.warmup = warmup
        self.freeze_to: FreezeTo = freeze_to

    def history(self, name: str, layer: QuantLayer, bits: Tensor) -> FreezableHistory:
        """A history that can freeze, in the layer's override slot."""
        if isinstance(layer, QuantConvBn2d):
            raise ValueError(
                f"callbacks.{self.slug}: the codes of {name} move with its folded batch-norm; use "
                "quantizer.fold_bn=none"
            )
        history = FreezableHistory(layer.weight, bits)
        layer.weight_override = FrozenCodes(history)
        return history

    def threshold(self, step: int, total: int) -> float:
        """The threshold at ``step`` of ``total``, counted from 1; 0 (nothing freezes) up to the end of the warm-up."""
        if step < self.warmup * total:
            return 0.0
        return annealed(step, total, self.threshold_start, self.threshold_final, self.warmup)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a threshold that freezes what oscillated once."""
        if 0 < self.threshold_final < LEAST_OSCILLATIONS * self.momentum:
            log.warning(
                "callbacks.%s.threshold_final=%g: one oscillation counts %g (momentum), use %d times that or more",
                self.slug,
                self.threshold_final,
                self.momentum,
                LEAST_OSCILLATIONS,
            )

    @torch.no_grad()
    def after_step(self, module: QuantModule) -> None:
        """Track, then freeze what oscillates more often than the threshold; it acts from the next step on."""
        super().after_step(module)
        threshold = self.threshold(module.progress.step, module.progress.total)
        if threshold <= 0:
            return
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            kind = layer.weight_quantizer.grid.kind
            self.histories[name].freeze(self.momentum, threshold, self.freeze_to, kind)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the share of frozen weights and the threshold."""
        progress = self.module.progress
        pl_module.log(f"{self.slug}/frozen", self.fraction("frozen"))
        pl_module.log(f"{self.slug}/threshold", self.threshold(progress.step, progress.total))

    def finalise(self, net: nn.Module) -> None:
        """Turn the frozen and the other codes of the tracked layers into fixed ones; latent weights stay."""
        for _, layer in quant_layers(net):
            if isinstance(layer.weight_override, FrozenCodes):
                settle(layer)
