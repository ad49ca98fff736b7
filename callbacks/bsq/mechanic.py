"""BSQ: exploring bit-level sparsity for mixed precision (Yang, Duan, Chen, Li, ICLR 2021; yanghr/BSQ)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import forget_momenta
from callbacks.bsq.quantizer import BitStacks
from callbacks.bsq.stacks import group_lasso
from callbacks.csq.search import PlaneSearch, planes_of
from research.learning.evaluation import Evaluation
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.quantizers.lsq import LSQ

log = logging.getLogger(__name__)


class BSQ(PlaneSearch):
    """Empties bit planes by a group lasso on them, and drops those that are empty, a few times in the run.

    The weights of the chosen layers are bit stacks (`BitStacks`): n planes are n + 1 bits, with the sign. Every
    ``interval`` the weights are rounded and the widths follow; at ``until`` this happens for the last time, the planes
    that the budget has no room for go as well, and training goes on at these widths, without the lasso.

    Args:
        budget: one or several, see `research.quant.budget`; published widths do not count the sign: they are one less.
        planes: most planes of a layer, with which it starts; 1 to 7.
        strength: alpha of the group lasso; how narrow the layers get follows from it, the budget only bounds them.
        interval: part of the run between two re-quantizations.
        until: part of the run after which the widths stay.
        search_ends: also the first and the last layer, instead of leaving them as they are.
        lr_factor: learning rate of the digits, as a multiple of the run's.
        adam_lr: learning rate of an Adam for the digits, in place of the run's optimizer; None: no such.
        weight_decay: of the digits and scales; None: the run's, or none where Adam trains them.
    """

    slug = "bsq"

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        planes: int = 7,
        strength: float = 0.01,
        interval: float = 0.15,
        until: float = 0.55,
        search_ends: bool = False,
        lr_factor: float = 1.0,
        adam_lr: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        super().__init__(budget, planes, until, 1, search_ends, lr_factor, adam_lr, weight_decay)
        if strength < 0:
            raise ValueError(f"callbacks.bsq.strength={strength}: use 0 or more, such as 0.01")
        if not 0 < interval <= 1:
            raise ValueError(f"callbacks.bsq.interval={interval}: use a part of the run above 0, up to 1")
        if not 0 < until <= 1:
            raise ValueError(f"callbacks.bsq.until={until}: use a part of the run above 0, up to 1")
        self.strength = strength
        self.interval = interval

    def make(self, source: LSQ) -> BitStacks:
        """Bit stacks."""
        return BitStacks(source, self.planes)

    def is_due(self, step: int, total: int) -> bool:
        """Whether a re-quantization stands in front of optimizer step ``step``, counted from 0, of ``total``."""
        last, every = self.last_step(total), max(1, round(self.interval * total))
        return step == last or 0 < step < last and step % every == 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Re-quantize where it is time; momenta are forgotten, as they belong to the digits before."""
        step, total = trainer.global_step, self.module.progress.total
        if not self.is_due(step, total) or int(self.state.mark) == step:
            return
        if step == self.last_step(total):
            self.settle(self.quantizers)
            self.state.fixed.fill_(True)
        else:
            for quantizer in self.quantizers.values():
                quantizer.requantize()
        self.state.mark.fill_(step)
        forget_momenta(trainer.optimizers, self.module.parameters())
        log.info("bsq: re-quantized; cost %s", self.costs(Allocation.of(self.module.net)))

    def settle(self, planes: Mapping[str, BitStacks]) -> None:
        """Re-quantize, then give up the last planes of layers until the budget is met, those that cost least first.

        The official code has no budget: this is a reconstruction. A plane costs the mean squared change of a weight.
        """
        for each in planes.values():
            each.requantize()
        while not self.fits({name: int(each.bits) for name, each in planes.items()}):
            errors = {name: each.halving_error() for name, each in planes.items() if int(each.live) > 1}
            planes[min(errors, key=errors.__getitem__)].halve()

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``bsq``: ``alpha / sum_l N_l sum_l N_l n_l G_l``; none once the widths are fixed, or with a strength of 0."""
        done = self.module.progress.step >= self.last_step(self.module.progress.total)
        if done or self.strength == 0:
            return {}
        quantizers = list(self.quantizers.values())
        weights = [each.positive.shape[1] for each in quantizers]
        groups = [
            count * each.live * group_lasso(each.positive, each.negative, each.live_planes)
            for count, each in zip(weights, quantizers, strict=True)
        ]
        return {self.slug: self.strength / sum(weights) * torch.stack(groups).sum()}

    def after_step(self, module: QuantModule) -> None:
        """Keep the digits in [0, 2]."""
        for quantizer in self.quantizers.values():
            quantizer.clamp()

    def exact_forms(self, net: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
        """The rounded weights; re-quantized within the budget where the widths are not fixed yet."""
        planes: dict[str, BitStacks] = {name: planes_of(net.get_submodule(name)) for name in self.layers}
        if not bool(self.state.fixed):
            self.settle(planes)
        return {name: (each.codes(each.positive), each.scale, int(each.bits)) for name, each in planes.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths."""
        pl_module.log_dict(self.metrics())
