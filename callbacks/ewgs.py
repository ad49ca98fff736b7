"""EWGS's Hessian-driven delta for ``quantizer=ewgs`` (Lee et al., CVPR 2021, arXiv 2104.00903; cvlab-yonsei/EWGS)."""

from __future__ import annotations

import lightning.pytorch as pl

from research.learning.hessian_scale import HessianScale
from research.learning.mechanic import Claim, Mechanic
from research.learning.module import QuantModule
from research.quant.layers import quantizers
from research.quant.quantizers.ewgs import EWGS


class EWGSDelta(Mechanic):
    """Measure every EWGS quantizer's ``delta`` anew every few epochs: mean curvature over spread of the gradient.

    Until the first measurement ``delta`` is what the quantizer's options say: 0, the plain estimator, unless given.

    Args:
        every_n_epochs, batches, batch_size, probes, tolerance: see `HessianScale`; the defaults but the batch size are
            the official code's.
    """

    slug = "ewgs"
    claims: frozenset[Claim] = frozenset({"weight_quantizer"})
    ddp = "per_replica"  # the rule takes |g|, and the mean of magnitudes is not the magnitude of the mean

    def __init__(
        self,
        every_n_epochs: int = 10,
        batches: int = 3,
        batch_size: int = 128,
        probes: int = 50,
        tolerance: float = 1e-3,
    ) -> None:
        self.scale = HessianScale("callbacks.ewgs", every_n_epochs, batches, batch_size, probes, tolerance)

    def attach(self, module: QuantModule) -> None:
        """Find the EWGS quantizers."""
        self.quantizers = {name: q for name, q in quantizers(module.net) if isinstance(q, EWGS)}
        if not self.quantizers:
            raise ValueError("callbacks.ewgs: the network has no ewgs quantizer to set delta of, use quantizer=ewgs")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a ``delta`` that is never measured."""
        self.scale.warn_if_never(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and set ``delta`` where the epoch asks for it."""
        measured = self.scale.measure(trainer, self.module, self.rng(trainer.global_step))
        for name, strength in (measured or {}).items():
            if name in self.quantizers:
                quantizer = self.quantizers[name]
                quantizer.delta.copy_(strength * quantizer.unit)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the mean ``delta``."""
        deltas = [float(quantizer.delta) for quantizer in self.quantizers.values()]
        pl_module.log("ewgs/delta", sum(deltas) / len(deltas))
