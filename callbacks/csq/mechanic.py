"""CSQ: growing mixed precision by bi-level continuous sparsification (Xiao, Yang, Dong, Keutzer, Du, Zhang, DAC 2023).

arXiv 2212.02770; lawsonX/CSQ. The body of the paper could not be read: see docs/methods/csq.md for what is a
reconstruction.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.csq.planes import prune, spans, temperature, width_of
from callbacks.csq.quantizer import GatedPlanes
from callbacks.csq.search import WEIGHTS, PlaneSearch, planes_of
from callbacks.csq.selection import gate_excess, gate_penalty, settled, span_excess
from research.learning.evaluation import Evaluation
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.cost_table import CostTable
from research.quant.quantizers.lsq import LSQ

log = logging.getLogger(__name__)
Ratio = Literal["cost", "gates"]
RATIOS: tuple[Ratio, ...] = get_args(Ratio)


class CSQ(PlaneSearch):
    """Learns which bit planes each layer needs: a gate on each, harder and harder, under a penalty that seeks a budget.

    The weights of the chosen layers are bit planes (`GatedPlanes`), with no estimator in their derivatives. A layer
    with n planes from the first open one to the last has n + 1 bits: the sign is one of them. At ``ticket`` the gates
    become 0 or 1, within the budget; the digits go on until the end, where they do too.

    Args:
        budget: one or several, see `research.quant.budget`; published targets do not count the sign: they are one less.
        planes: N, bit planes that a layer starts with; 1 to 7.
        strength: lambda of the penalty on the gates.
        ratio: what the penalty compares with the budget: ``cost``, or ``gates``, the share of open gates as in the
            official code, with a single budget of ``average_bits``.
        beta_max: inverse temperature at the end of a round.
        ticket: part of the run after which the gates are fixed.
        rounds: parts of the search with a temperature each, which begins at 1 again; gates that closed stay so.
        logit: digits start at the logits ``-logit`` and ``logit``; None: at 0 and 1, as in the official code.
        keep_one: no layer loses its last plane: the greatest gate of a layer is never closed.
        search_ends: also the first and the last layer, instead of leaving them as they are.
        lr_factor: learning rate of the digits' logits, as a multiple of the run's.
        adam_lr: learning rate of an Adam for these logits, in place of the run's optimizer; None: no such.
        weight_decay: of the logits, gates and scales; None: the run's, or none where Adam trains them.
    """

    slug = "csq"

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        planes: int = 7,
        strength: float = 0.01,
        ratio: Ratio = "cost",
        beta_max: float = 200.0,
        ticket: float = 0.9,
        rounds: int = 1,
        logit: float | None = None,
        keep_one: bool = True,
        search_ends: bool = False,
        lr_factor: float = 1.0,
        adam_lr: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        super().__init__(budget, planes, ticket, int(keep_one), search_ends, lr_factor, adam_lr, weight_decay)
        if strength < 0:
            raise ValueError(f"callbacks.csq.strength={strength}: use 0 or more, such as 0.01")
        if ratio not in RATIOS:
            raise ValueError(f"callbacks.csq.ratio={ratio}: use {' or '.join(RATIOS)}")
        if ratio == "gates" and [each.kind for each in self.budgets] != ["average_bits"]:
            raise ValueError("callbacks.csq.ratio=gates: it needs a single budget of average_bits, or use ratio=cost")
        if beta_max < 1:
            raise ValueError(f"callbacks.csq.beta_max={beta_max}: use 1 or more, such as 200")
        if not 0 < ticket <= 1:
            raise ValueError(f"callbacks.csq.ticket={ticket}: use a part of the run above 0, up to 1")
        if rounds < 1:
            raise ValueError(f"callbacks.csq.rounds={rounds}: use 1 or more")
        if logit is not None and logit <= 0:
            raise ValueError(f"callbacks.csq.logit={logit}: use more than 0, or null for logits of 0 and 1")
        self.strength = strength
        self.ratio: Ratio = ratio
        self.beta_max = beta_max
        self.rounds = rounds
        self.logit = logit
        self._table: CostTable | None = None

    def make(self, source: LSQ) -> GatedPlanes:
        """Planes with a gate on each."""
        return GatedPlanes(source, self.planes, self.logit)

    def position(self, step: int, total: int) -> tuple[int, float]:
        """The round of ``step``, counted from 0, and what part of it is over; the last round has no end."""
        progress = step / self.last_step(total) * self.rounds
        current = min(int(progress), self.rounds - 1)
        return current, progress - current

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature; between two rounds, undecide the open gates; when it is time, fix the gates."""
        step, total = trainer.global_step, self.module.progress.total
        current, progress = self.position(step, total)
        quantizers = self.quantizers.values()
        if current and current != int(self.state.mark):
            for quantizer in quantizers:
                quantizer.gates.copy_(prune(quantizer.gates, float(quantizer.beta)))
            self.state.mark.fill_(current)
        beta = temperature(progress, self.beta_max)
        for quantizer in quantizers:
            quantizer.beta.fill_(beta)
        if step >= self.last_step(total) and not bool(self.state.fixed):
            for name, opened in self.masks(self.module.net).items():
                self.quantizers[name].fix(torch.tensor(opened))
            self.state.fixed.fill_(True)
            log.info("csq: gates fixed; cost %s", self.costs(Allocation.of(self.module.net)))

    def excess(self) -> Tensor:
        """``R - R_t`` at the gates that are open now, 0-dim."""
        opened = torch.stack([quantizer.opened() for quantizer in self.quantizers.values()])
        if self.ratio == "gates":
            return gate_excess(opened, self.budgets[0].value - 1)
        if self._table is None:
            like = next(iter(self.quantizers.values())).gates.detach()
            budgets = [budget for budget in self.budgets if budget.kind in WEIGHTS]
            self._table = CostTable.of(budgets, self.counts, self.choices, list(self.layers)).to(like)
        return span_excess(self._table, spans(opened))

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``csq``: the penalty on the gates; none once they are fixed."""
        if self.module.progress.step >= self.last_step(self.module.progress.total):
            return {}
        quantizers = list(self.quantizers.values())
        gates = torch.stack([quantizer.gates for quantizer in quantizers])
        return {self.slug: gate_penalty(gates, quantizers[0].beta, self.excess(), self.strength)}

    @torch.no_grad()
    def after_step(self, module: QuantModule) -> None:
        """Keep a plane of every layer, and make the stated widths those of the open gates."""
        for quantizer in self.quantizers.values():
            if self.least:
                quantizer.keep_one()
            quantizer.settle_bits()

    def masks(self, net: nn.Module) -> dict[str, list[bool]]:
        """Which planes of ``net``, this network or a copy, stay when it becomes exact: within the budget."""
        planes = {name: planes_of(net.get_submodule(name)) for name in self.layers}
        if all(bool(each.hard) for each in planes.values()):
            return {name: (each.mask > 0).tolist() for name, each in planes.items()}
        gates = {name: each.gates.tolist() for name, each in planes.items()}
        return settled(gates, self.least, self.fits)

    def exact_forms(self, net: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
        """The digits made hard, of the planes that stay."""
        forms = {}
        for name, chosen in self.masks(net).items():
            planes = planes_of(net.get_submodule(name))
            opened = torch.tensor(chosen, device=planes.gates.device)
            width = width_of(int(spans(opened[None])[0]))
            forms[name] = planes.codes_of(opened), planes.scale_of(opened), width
        return forms

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log widths, open planes, the temperature, and how far the weights are from their exact values."""
        values = self.metrics()
        quantizers = self.quantizers
        values |= {f"csq/planes/{name}": float(each.opened().sum()) for name, each in quantizers.items()}
        values["csq/beta"] = float(next(iter(quantizers.values())).beta)
        errors, sizes = torch.stack([torch.stack(each.distance()) for each in quantizers.values()]).sum(0)
        values["csq/distance"] = float((errors / sizes).sqrt())
        pl_module.log_dict(values)
