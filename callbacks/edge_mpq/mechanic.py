"""Edge-MPQ: fully differentiable quantized mixed precision (Schaefer, Joshi, Li, Blazquez, WACV 2024).

arXiv 2206.07741; after the official code, Intelligent-Microsystems-Lab/HeterogeneousQuantization. The body of the paper
could not be read, see docs/methods/edge_mpq.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, EndingSearch
from callbacks.edge_mpq.formulas import GRADIENT_DEPENDENT, SURROGATES, Surrogate, ramp
from callbacks.edge_mpq.pressure import coarsen_until, penalty, present_layers
from callbacks.edge_mpq.quantizer import StepRange
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, ParameterGroup
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import UNITS, Budget, Choices, Kind, budgets_from_config, cost_metrics
from research.quant.cost import FLOAT_BITS, input_memory
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers import Quantizer, build_quantizer
from research.quant.quantizers.base import MAX_BITS, Role
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
SEARCHED = (LSQ, MinMax)
Slices = Literal["tensor", "channel"]
COUNTED: dict[Kind, tuple[Role, ...]] = {
    "average_bits": ("weight",),
    "size": ("weight",),
    "bops": ("weight", "input"),
    "activation_memory": ("input",),
    "activation_max": ("input",),
}
"""Whose widths a budget of a kind depends on: these are searched."""


class EdgeMPQ(BitSearch):
    """Trains a step and a range of every quantizer, from which its width follows, under a penalty on what widths cost.

    What the budgets count is searched: weights by one on the model's size, inputs by one on the activation memory; all
    else keeps the recipe's quantizers. Steps and ranges move in every ``update_every``-th step only. At ``until`` they
    are fixed, coarser where the budgets are not met, and the rest of the run trains everything else.

    Args:
        budget: one or several, see `research.quant.budget`.
        input_budget: a further one, on inputs; None: no such.
        slices: one width for a weight (``tensor``) or one for each output channel of a convolution (``channel``).
        start_bits: width that calibration starts with.
        min_bits: least width; signed codes have 2 bits at least.
        search_ends: also the first and the last layer, instead of leaving them as they are; the image's quantizer
            always stays.
        strength: factor of the penalty ``sum max(0, cost / budget - 1)^2``.
        ramp: part of the search over which that factor rises from a hundredth of itself.
        weight_surrogate, input_surrogate: slopes of rounding, see `callbacks.edge_mpq.formulas`.
        g_scale: delta, the strength of the surrogates; 0: straight-through.
        mix: share of ``tanh`` or ``invtanh`` in its slope, the rest is ``ewgs``.
        power_of_two: steps that are powers of two.
        update_every: optimizer steps between two of steps and ranges.
        lr_factor: learning rate of steps and ranges, as a multiple of the run's.
        until: part of the run after which the widths stay.
    """

    slug = "edge_mpq"
    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer"})
    state: EndingSearch

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        input_budget: Mapping[str, Any] | None = None,
        slices: Slices = "tensor",
        start_bits: int = 4,
        min_bits: int = 1,
        search_ends: bool = False,
        strength: float = 50.0,
        ramp: float = 0.5,
        weight_surrogate: Surrogate = "ewgs",
        input_surrogate: Surrogate = "invtanh",
        g_scale: float = 5e-3,
        mix: float = 1.0,
        power_of_two: bool = False,
        update_every: int = 5,
        lr_factor: float = 0.1,
        until: float = 0.6,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets: list[Budget] = budgets_from_config(budget, f"{key}.budget")
        if input_budget is not None:
            further = Budget.from_config(input_budget, f"{key}.input_budget")
            if COUNTED[further.kind] != ("input",):
                raise ValueError(f"{further.key}.kind={further.kind}: use activation_memory or activation_max")
            self.budgets.append(further)
        for name, word, known in (
            ("slices", slices, get_args(Slices)),
            ("weight_surrogate", weight_surrogate, SURROGATES),
            ("input_surrogate", input_surrogate, SURROGATES),
        ):
            if word not in known:
                raise ValueError(f"{key}.{name}={word}: use one of {', '.join(known)}")
        if not 2 <= start_bits <= MAX_BITS:
            raise ValueError(f"{key}.start_bits={start_bits}: use 2 to {MAX_BITS}")
        if not 1 <= min_bits <= start_bits:
            raise ValueError(f"{key}.min_bits={min_bits}: use 1 to start_bits={start_bits}")
        for name, number in (("strength", strength), ("g_scale", g_scale), ("mix", mix)):
            if number < 0:
                raise ValueError(f"{key}.{name}={number}: use 0 or more")
        if update_every < 1:
            raise ValueError(f"{key}.update_every={update_every}: use 1 or more steps")
        if lr_factor <= 0:
            raise ValueError(f"{key}.lr_factor={lr_factor}: use more than 0")
        if not 0 < ramp <= 1:
            raise ValueError(f"{key}.ramp={ramp}: use a part of the search above 0, up to 1")
        if not 0 < until < 1:
            raise ValueError(f"{key}.until={until}: use a part of the run, more than 0 and less than 1")
        self.searches = {role for each in self.budgets for role in COUNTED[each.kind]}
        self.slices = slices
        self.start_bits, self.min_bits = start_bits, min_bits
        self.search_ends = search_ends
        self.strength, self.ramp = strength, ramp
        self.surrogates: dict[Role, Surrogate] = {"weight": weight_surrogate, "input": input_surrogate}
        self.g_scale, self.mix = g_scale, mix
        if g_scale and weight_surrogate in GRADIENT_DEPENDENT:
            self.ddp = "per_replica"  # each process scales the gradient of its own part of the batch
        self.power_of_two = power_of_two
        self.update_every = update_every
        self.lr_factor = lr_factor
        self.until = until

    # -- construction ------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Put quantizers with a step and a range in the place of those that are searched."""
        net = module.net
        self.layers = self.searched_layers(net)
        for name, layer in self.layers.items():
            for role, source in slots_of(layer).items():
                image = role == "input" and name == net.structure().first
                if role in self.searches and source is not None and not image:
                    if type(source) not in SEARCHED or role == "weight" and source.zero_point is not None:
                        raise ValueError(
                            f"callbacks.{self.slug}: {name}.{role} has the quantizer {type(source).__name__}; use "
                            "lsq or minmax, signed for weights and without zero point, and quantizer.widths=[]"
                        )
                    setattr(layer, f"{role}_quantizer", self.make(source, layer, role))
        self.choices = self.reachable
        self.state = EndingSearch()
        module.mechanics[self.slug] = self.state

    def make(self, source: Quantizer, layer: QuantLayer, role: Role) -> Quantizer:
        """The quantizer that takes the place of ``source``; its specification alone makes it again."""
        channels = role == "weight" and self.slices == "channel" and isinstance(layer, nn.Conv2d)
        spec = replace(
            source.spec,
            name="callbacks.edge_mpq.StepRange",
            bits=self.start_bits,
            narrow=source.spec.signed is not False,
            granularity="channel" if channels else "tensor",
            options={
                "surrogate": self.surrogates[role],
                "delta": self.g_scale,
                "mix": self.mix,
                "least": self.min_bits,
                "power_of_two": self.power_of_two,
            },
        )
        return build_quantizer(spec, source.shape, layer.channel_axis, role)

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """Steps and ranges, without decay."""
        parameters = [parameter for each in self.quantizers for parameter in (each.d, each.xmax)]
        return [ParameterGroup(parameters, {"weight_decay": 0.0, "lr_factor": self.lr_factor})] if parameters else []

    @property
    def quantizers(self) -> Iterator[StepRange]:
        """All quantizers with a step and a range."""
        return (
            each for layer in self.layers.values() for each in slots_of(layer).values() if isinstance(each, StepRange)
        )

    @property
    def reachable(self) -> Choices:
        """Every width from the least to 8 bits for what is searched, the present one for all else."""
        net = self.module.net
        possible = {
            name: [
                range(each.floor, MAX_BITS + 1) if isinstance(each, StepRange) else [int(bits)]
                for each, bits in zip(slots_of(layer).values(), widest(net)[name], strict=True)
            ]
            for name, layer in quant_layers(net)
        }
        return {
            name: [LayerBits(w, i) for w in weights for i in inputs] for name, (weights, inputs) in possible.items()
        }

    # -- a step ------------------------------------------------------------------------------------------------

    def moves(self, step: int) -> bool:
        """Whether steps and ranges take part in optimizer step ``step``, counted from 0."""
        return not bool(self.state.over) and (step + 1) % self.update_every == 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the search when it is time."""
        if not bool(self.state.over) and trainer.global_step >= self.last_step(self.module.progress.total):
            self.end()

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``edge_mpq``: the penalty; none once the widths are fixed."""
        if bool(self.state.over) or not self.strength:
            return {}
        progress = self.module.progress
        rho = ramp(progress.step / self.last_step(progress.total), self.ramp)
        term = rho * self.strength * penalty(self.budgets, self.counts, self.module.net)
        return {self.slug: term.to(self.module.network_dtype)}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Clip the gradients of steps and ranges to the steps; take them away where neither is to move.

        Without a gradient an optimizer leaves a parameter and its momentum alone.
        """
        moving = self.moves(trainer.global_step)
        for quantizer in self.quantizers:
            bound = quantizer.d.detach()
            for parameter in (quantizer.d, quantizer.xmax):
                if not moving:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.clamp_(-bound, bound)

    def after_step(self, module: QuantModule) -> None:
        """Steps stay below ranges, both within their limits; ``bits`` follows."""
        if self.moves(module.progress.step - 1):
            for quantizer in self.quantizers:
                quantizer.project()

    # -- the end -----------------------------------------------------------------------------------------------

    def cost(self, budget: Budget, net: nn.Module) -> float:
        """What the widths of ``net``, this network or a copy, cost; with slices each at its own width."""
        return float(budget.cost_of(self.counts, present_layers(self.counts, net)))

    def metrics(self) -> dict[str, float]:
        """As of every search; with slices each at its own width."""
        return self.found().metrics() | cost_metrics(self.budgets, lambda each: self.cost(each, self.module.net))

    def end(self) -> None:
        """Fix steps and ranges, coarser where a budget is not met."""
        net = self.module.net
        for budget in self.budgets:
            if budget.additive and self.cost(budget, net) > budget.value:
                chosen = [each for each in self.quantizers if self._counts_in(budget, each)]
                coarsen_until(chosen, partial(self._met, budget))
            elif not budget.additive:
                for name, layer in self.layers.items():
                    if isinstance(layer.input_quantizer, StepRange) and not self._met_by(budget, name):
                        coarsen_until([layer.input_quantizer], partial(self._met_by, budget, name))
        self.state.over.fill_(True)
        costs = ", ".join(f"{self.cost(each, net):.6g} of {each.value:.6g} {UNITS[each.kind]}" for each in self.budgets)
        log.info("edge_mpq: the search is over; cost %s", costs)

    def _met(self, budget: Budget) -> bool:
        return self.cost(budget, self.module.net) <= budget.value

    def _met_by(self, budget: Budget, layer: str) -> bool:
        """Whether the input of one layer alone is within a budget on the largest."""
        counted = budget.counted(self.counts, present_layers(self.counts, self.module.net))
        return float(input_memory([each for each in counted if each.name == layer], "max")) <= budget.value

    def _counts_in(self, budget: Budget, quantizer: StepRange) -> bool:
        """Whether a width is part of what a budget counts."""
        before = self.cost(budget, self.module.net)
        quantizer.bits.zero_()
        without = self.cost(budget, self.module.net)
        quantizer.settle_bits()
        return without < before

    def found(self) -> Allocation:
        """The present widths; of a weight with slices the widest."""
        return widest(self.module.net)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths, with slices their means too, and what they cost."""
        values = self.metrics()
        if self.slices == "channel":
            for name, layer in self.layers.items():
                assert layer.weight_quantizer is not None
                values[f"{self.slug}/mean_bits/{name}"] = float(layer.weight_quantizer.bits.mean())
        pl_module.log_dict(values)

    def finalise(self, net: nn.Module) -> None:
        """Refuse an open search, and widths beyond a budget; the quantizers stay as they are.

        Neither in a host that was rebuilt from a configuration alone: its numbers come later.
        """
        self.require_over()
        if self.is_prepared:
            self.require_within(net)

    def require_within(self, net: nn.Module) -> None:
        """Raise ValueError where a finished network is beyond a budget; costs are known."""
        for budget in self.budgets:
            if (cost := self.cost(budget, net)) > budget.value:
                raise ValueError(
                    f"{budget.key}.value={budget.value:.12g}: the widths cost {cost:.12g} {UNITS[budget.kind]}"
                )


def slots_of(layer: QuantLayer) -> dict[Role, Quantizer | None]:
    """The quantizers of a layer's weight and input."""
    return {"weight": layer.weight_quantizer, "input": layer.input_quantizer}


def widest(net: nn.Module) -> Allocation:
    """The widths of a network, of a weight with slices the widest: what a table of layers can hold."""
    return Allocation(
        {
            name: LayerBits(
                *(FLOAT_BITS if each is None else int(each.bits.max()) for each in slots_of(layer).values())
            )
            for name, layer in quant_layers(net)
        }
    )
