"""DropBits: bit-wise regularisation of semi-relaxed quantizers, and the widths that it learns (Lee et al., 2019).

arXiv 1911.12990. A reconstruction in parts: see docs/methods/srq.md.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, EndingSearch
from callbacks.drop_bits.formulas import kept_bits, odds_against
from callbacks.drop_bits.quantizer import DroppedBits
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, ParameterGroup
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import budgets_from_config
from research.quant.ilp import allocate
from research.quant.layers import quantizers, replace_module
from research.quant.quantizers.base import MAX_BITS
from research.quant.quantizers.srq import SRQ
from research.quant.recipe import FLOAT_BITS

log = logging.getLogger(__name__)
Weighting = Literal["layer", "size"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


class DropBits(BitSearch):
    """Every step drops the upper bits of every semi-relaxed quantizer at random; the probabilities are trained.

    With ``strength`` 0 it regularises a network of fixed widths. Else a penalty on the levels lowers their
    probabilities, and the search ends when the probable widths are within the budget, at the latest at ``until``; the
    rest of the run trains these widths, nothing dropped.

    Args:
        budget: one or several, see `research.quant.budget`; None: ``strength`` alone decides how many bits there are.
        bits: width that the weights start a search with, 2 or more: they keep 1 to so many.
        input_bits: the same for the quantized inputs of these layers; None: inputs stay as they are.
        search_ends: also the first and the last layer, instead of leaving them as they are.
        keep: ``sigmoid(log_a)`` at first; 1: nothing is dropped, the mechanic does nothing.
        learn: train ``log_a``, or leave it as it starts.
        strength: lambda of the penalty on the weights' levels; 0: no search, the widths are those of the recipe.
        input_strength: lambda of the inputs' levels; None: ``strength``.
        weighting: of the penalty: all layers alike, or ``size``: by their weights (or input elements), 1 on average.
        lr: learning rate of ``log_a``, by Adam without weight decay, on the run's schedule.
        until: part of the run after which nothing is dropped; up to 1.
    """

    slug = "drop_bits"
    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer"})
    state: EndingSearch

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        bits: int = 4,
        input_bits: int | None = None,
        search_ends: bool = False,
        keep: float = 0.9,
        learn: bool = True,
        strength: float = 0.1,
        input_strength: float | None = None,
        weighting: Weighting = "size",
        lr: float = 0.01,
        until: float = 0.6,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets = [] if budget is None else budgets_from_config(budget, f"{key}.budget")
        for name, width in (("bits", bits), ("input_bits", 2 if input_bits is None else input_bits)):
            if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= MAX_BITS:
                raise ValueError(f"{key}.{name}={width}: use 2 to {MAX_BITS}, such as 4")
        if not 0 < keep <= 1:
            raise ValueError(f"{key}.keep={keep}: use a probability above 0, such as 0.9")
        for name, number in (("strength", strength), ("input_strength", input_strength or 0.0)):
            if number < 0:
                raise ValueError(f"{key}.{name}={number}: use 0 or more")
        if strength and (keep == 1 or not learn):
            raise ValueError(f"{key}.strength={strength}: no probability to press on; use learn=true and keep below 1")
        if self.budgets and not strength:
            raise ValueError(f"{key}.budget: with strength=0 the widths stay as they are; use budget=null")
        if input_strength is not None and (input_bits is None or not strength):
            raise ValueError(f"{key}.input_strength={input_strength}: it needs input_bits and strength, or use null")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"{key}.weighting={weighting}: use one of {', '.join(WEIGHTINGS)}")
        if lr <= 0:
            raise ValueError(f"{key}.lr={lr}: use more than 0")
        if not 0 < until <= 1 or (strength and until == 1):
            raise ValueError(f"{key}.until={until}: use a part of the run, more than 0 and, in a search, less than 1")
        self.bits, self.input_bits = bits, input_bits
        self.search_ends = search_ends
        self.keep, self.learn = keep, learn
        self.strength = strength
        self.input_strength = strength if input_strength is None else input_strength
        self.weighting: Weighting = weighting
        self.lr = lr
        self.until = until
        self._checked: Allocation | None = None

    # -- construction ------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Give the layers their widest grids and put quantizers that drop bits in place."""
        net = module.net
        self.layers = self.searched_layers(net)
        slots = ["weight_quantizer"] if self.input_bits is None else ["weight_quantizer", "input_quantizer"]
        found = {
            f"{name}.{slot}": getattr(layer, slot)
            for slot in slots
            for name, layer in self.layers.items()
            if getattr(layer, slot) is not None
        }
        for name, quantizer in found.items():
            if type(quantizer) is not SRQ:
                raise ValueError(
                    f"callbacks.{self.slug}: {name} is {type(quantizer).__name__}, and only bits of srq are dropped; "
                    "use quantizer=srq and quantizer.widths=[]"
                )
        self.state = EndingSearch()
        module.mechanics[self.slug] = self.state
        self.dropped: dict[str, DroppedBits] = {}
        if self.keep == 1:
            self.choices = self.choices_of(net, lambda present: [present])
            return
        if self.strength:
            self.choices = self.choices_of(net, self._candidates)
            self.start_at_widest(net)
        else:
            self.choices = self.choices_of(net, lambda present: [present])
            if narrow := [name for name, quantizer in found.items() if int(quantizer.bits) < 2]:
                raise ValueError(f"callbacks.{self.slug}: {narrow[0]} has one bit, none to drop; use 2 or more")
        for name, quantizer in found.items():
            self.dropped[name] = DroppedBits(quantizer, int(quantizer.bits), self.keep, self.learn)
            replace_module(net, name, self.dropped[name])

    def _candidates(self, present: LayerBits) -> list[LayerBits]:
        kept = self.input_bits is None or present.input == FLOAT_BITS
        inputs = [present.input] if kept else range(1, (self.input_bits or 0) + 1)
        return [LayerBits(weight, width) for weight, width in itertools.product(range(1, self.bits + 1), inputs)]

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """``log_a``, with an Adam of its own."""
        if not self.learn or not self.dropped:
            return []
        log_a = [quantizer.log_a for quantizer in self.dropped.values()]
        return [ParameterGroup(log_a, {"lr": self.lr, "weight_decay": 0.0}, {"_target_": "torch.optim.Adam"})]

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Note the size of an image; a search that is within its budget at once is over."""
        super().prepare(module, loader)
        self._end_if_within()

    # -- a step ------------------------------------------------------------------------------------------------

    def last_step(self, total: int) -> int:
        """The optimizer step of ``total``, counted from 0, in front of which dropping ends; a search has an end."""
        return super().last_step(total) if self.strength else max(1, round(self.until * total))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the masks' noise: once a step, whatever is evaluated in it; or end the dropping."""
        if bool(self.state.over):
            return
        if trainer.global_step >= self.last_step(self.module.progress.total):
            self.end()
            return
        generator = self.rng(trainer.global_step)
        for quantizer in self.dropped.values():
            u = torch.rand(quantizer.noise.shape, generator=generator, dtype=torch.float64)
            quantizer.noise.copy_(u.clamp(1e-6, 1 - 1e-6))

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``drop_bits`` and ``drop_bits_inputs``: ``lambda sum_layers sum_k P(Z_k != 0)``; none without a search."""
        if bool(self.state.over) or not self.dropped or not self.strength:
            return {}
        terms = {self.slug: self.strength * self._expected_levels("weight")}
        if any(quantizer.role == "input" for quantizer in self.dropped.values()):
            terms[f"{self.slug}_inputs"] = self.input_strength * self._expected_levels("input")
        return terms

    def _expected_levels(self, role: str) -> Tensor:
        chosen = {name: each for name, each in self.dropped.items() if each.role == role}
        weights = [1.0] * len(chosen)
        if self.weighting == "size":
            sizes = {layer.name: layer.weights if role == "weight" else layer.inputs for layer in self.counts.layers}
            own = [sizes[name.rpartition(".")[0]] for name in chosen]
            weights = [len(own) * size / sum(own) for size in own]
        kept = [torch.sigmoid(quantizer.nonzero).sum() for quantizer in chosen.values()]
        return torch.stack([weight * each for weight, each in zip(weights, kept, strict=True)]).sum()

    @torch.no_grad()
    def after_step(self, module: QuantModule) -> None:
        """In a search: let the stated widths be the probable ones, and end within the budget."""
        if bool(self.state.over) or not self.dropped or not self.strength:
            return
        for quantizer, logits in zip(self.dropped.values(), self._logits(), strict=True):
            quantizer.bits.fill_(kept_bits(logits))
        self._end_if_within()

    def _logits(self) -> list[list[float]]:
        """`nonzero_logit` of every quantizer's levels, read at once."""
        sizes = [len(quantizer.log_a) for quantizer in self.dropped.values()]
        found = iter(torch.cat([quantizer.nonzero.detach() for quantizer in self.dropped.values()]).tolist())
        return [list(itertools.islice(found, size)) for size in sizes]

    # -- the end -----------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the widths are decided: without a search they always are."""
        return not self.strength or bool(self.state.over)

    def _end_if_within(self) -> None:
        """End the search if the probable widths are within the budget, which is looked at when they have changed."""
        if bool(self.state.over) or not self.dropped or not self.budgets:
            return
        present = Allocation.of(self.module.net)
        changed, self._checked = present != self._checked, present
        if changed and self.within(present):
            self.end()

    @torch.no_grad()
    def end(self) -> None:
        """Fix the masks: the probable widths, with a budget the most probable up to these that are within it."""
        found = self.read_out() if self.dropped else self.found()
        found.apply(self.module.net)
        for quantizer in self.dropped.values():
            quantizer.decided.fill_(True)
        self.state.over.fill_(True)
        if self.strength:
            widths = ", ".join(str(found[name]) for name in self.layers)
            log.info("drop_bits: the search is over; bits %s; cost %s", widths, self.costs(found))

    def read_out(self) -> Allocation:
        """The allocation that the masks have come to; beyond a budget, reduced where the odds are least against it
        (the reduction: inferred).
        """
        present = self.found()
        if not self.budgets or self.within(present):
            return present
        tables = {
            name: odds_against(quantizer.nonzero.detach(), int(quantizer.bits))
            for name, quantizer in self.dropped.items()
        }
        sensitivities = {
            name: {
                bits: sum(
                    tables[key][width - 1]
                    for key, width in (
                        (f"{name}.weight_quantizer", bits.weight),
                        (f"{name}.input_quantizer", bits.input),
                    )
                    if key in tables
                )
                for bits in options
                if bits.weight <= present[name].weight and bits.input <= present[name].input
            }
            for name, options in self.choices.items()
        }
        return allocate(sensitivities, self.counts, self.budgets)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths in evaluation, the expected widths, and the mean noise in steps of the grid."""
        values = self.metrics()
        if self.dropped:
            expected = {name: float(each.expected_bits) for name, each in self.dropped.items()}
            values |= {f"{self.slug}/expected/{name.removesuffix('_quantizer')}": b for name, b in expected.items()}
            ratios = torch.stack([(each.sigma / each.scale).mean() for each in self.dropped.values()])
            values[f"{self.slug}/sigma"] = float(ratios.mean())
        pl_module.log_dict(values)

    def finalise(self, net: nn.Module) -> None:
        """Put plain SRQ quantizers in place; refuse an open search, and widths beyond the budget."""
        self.require_over()
        for name, quantizer in list(quantizers(net)):
            if isinstance(quantizer, DroppedBits):
                replace_module(net, name, quantizer.plain())
        if self.is_prepared:
            self.require_within(net)
