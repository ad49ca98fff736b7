"""SDQ: stochastic differentiable quantization, the search for bit-widths (Huang et al., ICML 2022, arXiv 2206.04459).

A reconstruction in large parts: the paper's text could not be read, see docs/methods/sdq.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, EndingSearch, forget_momenta
from callbacks.sdq.formulas import CHOICES, WEIGHTINGS, Choice, Weighting, improbabilities, logistic_noise
from callbacks.sdq.pressure import qer, size_hinge
from callbacks.sdq.quantizer import StochasticWidth
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, ParameterGroup
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import budgets_from_config
from research.quant.ilp import allocate
from research.quant.layers import quantizers, replace_module
from research.quant.quantizers.base import MAX_BITS
from research.quant.quantizers.dorefa import DoReFa
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
SEARCHED = (LSQ, MinMax, DoReFa)
OptimizerName = Literal["adam", "sgd"]
OPTIMIZERS: dict[OptimizerName, str] = {"adam": "torch.optim.Adam", "sgd": "torch.optim.SGD"}


class SDQ(BitSearch):
    """Every layer draws one of two neighbouring widths in every step; the probability of the higher one is trained.

    All layers start at the widest candidate. A layer whose probability falls below ``threshold`` goes down by one
    candidate, for good. The search ends when the more probable widths are within the budget, at the latest at
    ``until``, with the most probable ones that are; the rest of the run trains these.

    Args:
        budget: one or several, see `research.quant.budget`; None: ``strength`` alone decides how many bits there are.
        bits: candidate widths of the weights; inputs keep theirs.
        search_ends: choose the widths of the first and the last layer too, instead of leaving them as they are.
        choice: ``sample``, or ``interpolate``, the expected weight (ablation).
        tau: temperature of the draw's gradient.
        start: first probability of the higher of two widths.
        threshold: probability below which a layer goes down.
        qer: quantization-error regulariser: ``weighted``, ``expected`` (all errors alike) or ``none``.
        strength: lambda_Q, its factor.
        hinge: factor of the expected cost's excess over the budget, as a part of it.
        optimizer: of the probabilities: ``adam`` or ``sgd``; they are not decayed.
        lr: its learning rate, on the run's schedule.
        until: part of the run after which the widths stay.
    """

    slug = "sdq"
    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer"})
    state: EndingSearch

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
        search_ends: bool = False,
        choice: Choice = "sample",
        tau: float = 1.0,
        start: float = 0.9,
        threshold: float = 0.1,
        qer: Weighting = "weighted",
        strength: float = 0.1,
        hinge: float = 0.0,
        optimizer: OptimizerName = "adam",
        lr: float = 0.01,
        until: float = 0.6,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets = [] if budget is None else budgets_from_config(budget, f"{key}.budget")
        if not bits or not all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in bits):
            raise ValueError(f"{key}.bits={bits}: use widths from 1 to {MAX_BITS}, such as [2, 3, 4]")
        for name, value, known in (
            ("choice", choice, CHOICES),
            ("qer", qer, WEIGHTINGS),
            ("optimizer", optimizer, get_args(OptimizerName)),
        ):
            if value not in known:
                raise ValueError(f"{key}.{name}={value}: use one of {', '.join(known)}")
        for name, number in (("tau", tau), ("lr", lr)):
            if number <= 0:
                raise ValueError(f"{key}.{name}={number}: use more than 0")
        for name, number in (("strength", strength), ("hinge", hinge)):
            if number < 0:
                raise ValueError(f"{key}.{name}={number}: use 0 or more")
        if hinge and not self.budgets:
            raise ValueError(f"{key}.hinge={hinge}: there is no budget to exceed; give {key}.budget, or use 0")
        if not 0 < threshold < 0.5 < start < 1:
            raise ValueError(
                f"{key}: threshold={threshold}, start={start}: use probabilities, threshold below 0.5 and start above"
            )
        if not 0 < until < 1:
            raise ValueError(f"{key}.until={until}: use a part of the run, more than 0 and less than 1")
        self.bits = sorted(set(bits))
        self.search_ends = search_ends
        self.choice, self.tau = choice, tau
        self.start, self.threshold = start, threshold
        self.qer, self.strength, self.hinge = qer, strength, hinge
        self.optimizer: OptimizerName = optimizer
        self.lr = lr
        self.until = until
        self._checked: Allocation | None = None
        self._pressure: Tensor | None = None

    # -- construction ------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Find the layers, give them their widest candidate and, with several, a quantizer that draws."""
        net = module.net
        self.layers = self.searched_layers(net)
        for name, layer in self.layers.items():
            if not isinstance(layer.weight_quantizer, SEARCHED):
                raise ValueError(
                    f"callbacks.sdq: {name} has the weight quantizer {type(layer.weight_quantizer).__name__}; use "
                    "lsq, minmax, dorefa or callbacks.sdq.ConstantMaxDoReFa, and quantizer.widths=[]"
                )
        self.choices = self.choices_of(net, lambda present: [LayerBits(b, present.input) for b in self.bits])
        self.start_at_widest(net)
        self.coins: dict[str, StochasticWidth] = {}
        if len(self.bits) > 1:
            for name, layer in self.layers.items():
                assert layer.weight_quantizer is not None
                pair = (self.bits[-1], self.bits[-2])
                coin = StochasticWidth(layer.weight_quantizer, pair, self.start, self.tau, self.choice)
                replace_module(net, f"{name}.weight_quantizer", coin)
                self.coins[name] = coin
        self.state = EndingSearch(over=not self.coins)
        module.mechanics[self.slug] = self.state

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """The probabilities, with an optimizer of their own."""
        betas = [coin.beta for coin in self.coins.values()]
        options = {"lr": self.lr, "weight_decay": 0.0}
        return [ParameterGroup(betas, options, {"_target_": OPTIMIZERS[self.optimizer]})] if betas else []

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Note the size of an image; a search that is within its budget at once is over."""
        super().prepare(module, loader)
        self._end_if_settled()

    # -- a step ------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw every layer's width: once a step, whatever is evaluated in it; or end the search."""
        if bool(self.state.over):
            return
        if trainer.global_step >= self.last_step(self.module.progress.total):
            self.end()
            return
        noise = logistic_noise(
            torch.rand(len(self.coins), generator=self.rng(trainer.global_step), dtype=torch.float64)
        )
        for coin, value in zip(self.coins.values(), noise, strict=True):
            coin.noise.copy_(value)

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``sdq``: the regulariser and the hinge; none once the widths are decided. Weights get no gradient of it."""
        if bool(self.state.over):
            return {}
        certainty = torch.stack([coin.certainty for coin in self.coins.values()])
        terms = []
        if self.qer != "none" and self.strength:
            pairs = [(coin, self.layers[name].float_weight()) for name, coin in self.coins.items()]
            terms.append(self.strength * qer(certainty, pairs, self.qer))
        if self.hinge:
            pair = {name: (coin.higher, coin.lower) for name, coin in self.coins.items()}
            present = Allocation.of(self.module.net)
            terms.append(self.hinge * size_hinge(certainty, pair, present, self.counts, self.budgets))
        if not terms:
            return {}
        term = torch.stack(terms).sum()
        (self._pressure,) = torch.autograd.grad(term, certainty, retain_graph=True)
        return {self.slug: term}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Log the two parts of the probabilities' mean gradient."""
        if bool(self.state.over):
            return
        undecided = [row for row, coin in enumerate(self.coins.values()) if bool(coin.undecided)]
        found = torch.stack(
            [coin.beta.new_zeros(()) if coin.beta.grad is None else coin.beta.grad for coin in self.coins.values()]
        )
        pressure = torch.zeros_like(found) if self._pressure is None else self._pressure
        parts = {"task": found - pressure, "regulariser": pressure}
        values = {f"{self.slug}/gradient_{part}": value[undecided].mean() for part, value in parts.items()}
        pl_module.log_dict(values, on_step=False, on_epoch=True)

    def after_step(self, module: QuantModule) -> None:
        """Keep probabilities off 0 and 1; layers that fell below the threshold go down; end within the budget."""
        if bool(self.state.over):
            return
        for name, coin in self.coins.items():
            coin.follow()
            if bool(coin.undecided) and float(coin.beta.detach()) < self.threshold:
                below = [width for width in self.bits if width < int(coin.lower.bits)]
                coin.step_down(below[-1] if below else None, self.layers[name].float_weight())
                self._forget(coin)
        self._end_if_settled()

    def _forget(self, coin: StochasticWidth) -> None:
        """Its parameters are new ones: the optimizer's state belonged to the old."""
        forget_momenta(self.module.trainer.optimizers, coin.parameters())

    # -- the end -----------------------------------------------------------------------------------------------

    def _end_if_settled(self) -> None:
        """End the search if the more probable widths are within the budget, or all layers at the lowest candidate.

        The budget is looked at when the widths have changed.
        """
        if bool(self.state.over):
            return
        present = Allocation.of(self.module.net)
        changed, self._checked = present != self._checked, present
        within = changed and self.within(present)
        if (self.budgets and within) or not any(bool(coin.undecided) for coin in self.coins.values()):
            self.end()

    def end(self) -> None:
        """Decide: the most probable widths, with a budget the most probable that are within it."""
        found = self.most_probable()
        for name, coin in self.coins.items():
            coin.decide(found[name].weight, self.layers[name].float_weight())
            self._forget(coin)
        self.state.over.fill_(True)
        widths = ", ".join(str(found[name].weight) for name in self.coins)
        log.info("sdq: the search is over; bits %s; cost %s", widths, self.costs(found))

    def most_probable(self) -> Allocation:
        """The allocation that the probabilities favour, within the budgets."""
        present = Allocation.of(self.module.net)
        if not self.budgets:
            return present
        sensitivities = {name: {bits: 0.0} for name, bits in present.items()}
        for name, coin in self.coins.items():
            reached = [width for width in self.bits if width <= int(coin.higher.bits)]
            values = improbabilities(reached, float(coin.beta.detach()), self.start)
            sensitivities[name] = {LayerBits(b, present[name].input): value for b, value in values.items()}
        return allocate(sensitivities, self.counts, self.budgets, current=present)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths in evaluation and the probabilities."""
        values = self.metrics()
        if not bool(self.state.over):
            betas = {name: float(coin.certainty.detach()) for name, coin in self.coins.items()}
            values |= {f"{self.slug}/beta/{name}": beta for name, beta in betas.items()}
            values[f"{self.slug}/beta_mean"] = sum(betas.values()) / len(betas)
        pl_module.log_dict(values)

    def finalise(self, net: nn.Module) -> None:
        """Put plain quantizers of the decided widths in place; refuse an open search, and widths beyond the budget.

        Neither in a host that was rebuilt from a configuration alone: its numbers come later.
        """
        self.require_over()
        for name, quantizer in list(quantizers(net)):
            if isinstance(quantizer, StochasticWidth):
                replace_module(net, name, quantizer.higher)
        if self.is_prepared:
            self.require_within(net)
