"""SSPS: sequential single-path search (Sun, Jiao, Ren, Li, Shang, Liu, arXiv 2103.02904; IEEE Trans. Cybernetics 2022).

A reconstruction in large parts: of the paper's text only the abstracts and the beginning could be read, see
docs/methods/ssps.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, SearchState, forget_momenta
from callbacks.ssps.cost import ExpectedCost, repaired
from callbacks.ssps.formulas import (
    CERTAINTIES,
    Certainty,
    cells_due,
    certainty,
    entropy,
    excess_penalty,
    gumbel,
    most_certain_first,
)
from callbacks.ssps.quantizer import GRADS, Grad, SearchCell
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, ParameterGroup
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import budgets_from_config
from research.quant.layers import quantizers, replace_module
from research.quant.quantizers import Quantizer
from research.quant.quantizers.base import MAX_BITS
from research.quant.quantizers.dorefa import DoReFa
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
SEARCHED = (LSQ, MinMax, DoReFa)
Slot = Literal["weight", "input"]
Pick = Literal["sample", "argmax"]
PICKS: tuple[Pick, ...] = get_args(Pick)


class CellState(SearchState):
    """What the mechanic keeps in checkpoints next to its cells.

    Attributes:
        fixed: number of cells whose width is decided.
    """

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.tensor(0))


class SSPS(BitSearch):
    """Every weight, and every input if wanted, picks one of several widths in every step; the logits are trained.

    ``L = task + strength * max(expected cost / budget - 1, 0)^2``. After a warm-up with equal probabilities, the cells
    are fixed one after another, the most certain first, at their most probable width; where the rest could not meet the
    budget any more, at a lower one. At ``until`` all are; the rest of the run trains these widths.

    Args:
        budget: one or several, see `research.quant.budget`.
        bits: candidate widths of the weights.
        input_bits: candidate widths of the inputs; None: they keep theirs.
        search_ends: also the first and the last layer, instead of leaving them as they are.
        grad: ``all``, the straight-through gradient of every logit, for which all candidates quantize the tensor; or
            ``sampled``, by the executed one alone.
        pick: ``sample``, by Gumbel noise; or ``argmax`` after the warm-up.
        tau_start, tau_end: temperature of the gradient, falling linearly until the end of the search.
        strength: lambda of the constraint.
        two_sided: a cost below the budget is penalised too.
        ramp: part of the search, after the warm-up, over which ``strength`` rises from 0.
        certainty: ``max``, ``margin`` or ``entropy``.
        rounds: parts of the search, after the warm-up, at whose ends cells are fixed.
        warmup: part of the run with equal probabilities.
        until: part of the run after which the widths stay.
        lr: learning rate of the logits' Adam, on the run's schedule.
        weight_decay: of the logits.
    """

    slug = "ssps"
    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer"})
    state: CellState

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
        input_bits: Sequence[int] | None = None,
        search_ends: bool = False,
        grad: Grad = "all",
        pick: Pick = "sample",
        tau_start: float = 5.0,
        tau_end: float = 0.5,
        strength: float = 1.0,
        two_sided: bool = False,
        ramp: float = 0.0,
        certainty: Certainty = "max",
        rounds: int = 25,
        warmup: float = 0.1,
        until: float = 0.6,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets = budgets_from_config(budget, f"{key}.budget")
        for name, widths in (("bits", bits), ("input_bits", [8] if input_bits is None else input_bits)):
            if not widths or not all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in widths):
                raise ValueError(f"{key}.{name}={widths}: use widths from 1 to {MAX_BITS}, such as [2, 3, 4]")
        for name, value, known in (
            ("grad", grad, GRADS),
            ("pick", pick, PICKS),
            ("certainty", certainty, CERTAINTIES),
        ):
            if value not in known:
                raise ValueError(f"{key}.{name}={value}: use one of {', '.join(known)}")
        for name, number in (("tau_start", tau_start), ("tau_end", tau_end), ("lr", lr)):
            if number <= 0:
                raise ValueError(f"{key}.{name}={number}: use more than 0")
        for name, number in (("strength", strength), ("weight_decay", weight_decay)):
            if number < 0:
                raise ValueError(f"{key}.{name}={number}: use 0 or more")
        if not 0 <= ramp <= 1:
            raise ValueError(f"{key}.ramp={ramp}: use a part of the search, 0 to 1")
        if rounds < 1:
            raise ValueError(f"{key}.rounds={rounds}: use 1 or more")
        if not 0 <= warmup < until < 1:
            raise ValueError(f"{key}: warmup={warmup}, until={until}: use parts of the run, 0 <= warmup < until < 1")
        self.bits = sorted(set(bits))
        self.input_bits = None if input_bits is None else sorted(set(input_bits))
        self.search_ends = search_ends
        self.grad: Grad = grad
        self.pick: Pick = pick
        self.tau = (tau_start, tau_end)
        self.strength, self.two_sided, self.ramp = strength, two_sided, ramp
        self.certainty: Certainty = certainty
        self.rounds = rounds
        self.warmup, self.until = warmup, until
        self.lr, self.weight_decay = lr, weight_decay
        self._exact: ExpectedCost | None = None
        self._placed: ExpectedCost | None = None

    # -- construction ------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Find the layers, give them their widest candidates and, where there are several, search cells."""
        net, key = module.net, f"callbacks.{self.slug}"
        self.layers = self.searched_layers(net)
        present = Allocation.of(net)
        self.widths: dict[str, dict[Slot, list[int]]] = {}
        sources: dict[tuple[str, Slot], Quantizer] = {}
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            self.widths[name] = {"weight": self.bits, "input": [present[name].input]}
            sources[name, "weight"] = layer.weight_quantizer
            if self.input_bits is not None and layer.input_quantizer is not None:
                self.widths[name]["input"] = self.input_bits
                sources[name, "input"] = layer.input_quantizer
        if self.input_bits is not None and len(sources) == len(self.layers):
            log.warning("%s.input_bits=%s: no searched layer quantizes its input", key, self.input_bits)
        for (name, slot), source in sources.items():
            if not isinstance(source, SEARCHED):
                raise ValueError(
                    f"{key}: {name} has the {slot} quantizer {type(source).__name__}; use lsq, minmax, dorefa or pact, "
                    "and quantizer.widths=[]"
                )
        self.choices = {
            name: [LayerBits(w, a) for w in self.widths[name]["weight"] for a in self.widths[name]["input"]]
            if name in self.layers
            else [bits]
            for name, bits in present.items()
        }
        self.start_at_widest(net)
        self.cells: dict[str, SearchCell] = {}
        for (name, slot), source in sources.items():
            if len(self.widths[name][slot]) > 1:
                cell = SearchCell(source, self.widths[name][slot], self.grad)
                replace_module(net, f"{name}.{slot}_quantizer", cell)
                self.cells[f"{name}.{slot}"] = cell
        self.state = CellState()
        module.mechanics[self.slug] = self.state

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """The logits, with an Adam of their own."""
        logits = [cell.alpha for cell in self.cells.values()]
        options = {"lr": self.lr, "betas": (0.5, 0.999), "weight_decay": self.weight_decay}
        return [ParameterGroup(logits, options, {"_target_": "torch.optim.Adam"})] if logits else []

    # -- costs -------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> ExpectedCost:
        """Costs at all pairs of candidates, in float64 on the CPU."""
        if self._exact is None:
            most = 1 if self.input_bits is None else len(self.input_bits)
            pairs = {
                name: [[LayerBits(w, a) for a in (slots["input"] * most)[:most]] for w in slots["weight"]]
                for name, slots in self.widths.items()
            }
            self._exact = ExpectedCost.of_pairs(self.budgets, self.counts, self.choices, pairs)
        return self._exact

    def rows(self, slot: Slot, of_cell: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Probabilities of all searched layers, (layers, candidates); the first candidate where there is no cell.

        Args:
            slot: weights or inputs.
            of_cell: probabilities by cell.
            like: of the device and dtype to use.
        """
        candidates = len(self.bits) if slot == "weight" else len(self.input_bits or [0])
        single = torch.eye(candidates, device=like.device, dtype=like.dtype)[0]
        return torch.stack([of_cell.get(f"{name}.{slot}", single) for name in self.layers])

    def ratios(self) -> Tensor:
        """The expected cost as a part of every budget, differentiable, (budgets,)."""
        found = {name: cell.probabilities for name, cell in self.cells.items()}
        like = next(iter(found.values())).detach()
        if self._placed is None:
            self._placed = self.expected.to(like)
        return self._placed.ratios(self.rows("weight", found, like), self.rows("input", found, like))

    def at(self, picks: Mapping[str, int]) -> Allocation:
        """The allocation with these candidates, by cell, and the least ones in all other cells."""
        found = {name: options[0] for name, options in self.choices.items()}
        for name, slots in self.widths.items():
            weight, inputs = (slots[slot][picks.get(f"{name}.{slot}", 0)] for slot in slots)
            found[name] = LayerBits(weight, inputs)
        return Allocation(found)

    def excess(self, picks: Mapping[str, int]) -> float:
        """By how much the allocation `at` these picks is beyond the budgets, in parts of them."""
        like = torch.zeros((), dtype=torch.float64)
        found = {
            name: torch.eye(len(cell.widths), dtype=like.dtype)[picks.get(name, 0)] for name, cell in self.cells.items()
        }
        return self.expected.excess(self.rows("weight", found, like), self.rows("input", found, like))

    # -- a step ------------------------------------------------------------------------------------------------

    def span(self, total: int) -> tuple[int, int]:
        """The optimizer steps, counted from 0, of ``total`` in front of which the warm-up and the search end."""
        end = self.last_step(total)
        return min(round(self.warmup * total), end - 1), end

    @property
    def over(self) -> bool:
        """Whether all widths are decided."""
        return int(self.state.fixed) == len(self.cells)

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fix the cells that are due; set what the others pick: once a step, whatever is evaluated in it."""
        if self.over:
            return
        step, (warm, end) = trainer.global_step, self.span(self.module.progress.total)
        self.fix(cells_due(step, warm, end, self.rounds, len(self.cells)))
        first, last = self.tau
        rng, sampling = self.rng(step), self.pick == "sample" or step < warm
        for cell in self.cells.values():
            cell.tau.fill_(first + (last - first) * min(step / end, 1.0))
            noise = gumbel(torch.rand(len(cell.noise), generator=rng, dtype=torch.float64))
            cell.noise.copy_(noise if sampling else torch.zeros_like(noise))

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``ssps``: the constraint, while logits are trained. Weights get no gradient of it."""
        step, (warm, end) = self.module.progress.step, self.span(self.module.progress.total)
        if self.over or step < warm:
            return {}
        rise = min((step - warm) / (self.ramp * (end - warm)), 1.0) if self.ramp else 1.0
        return {self.slug: self.strength * rise * excess_penalty(self.ratios(), self.two_sided)}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """In the warm-up no logit has a gradient, afterwards none of a fixed cell."""
        warm = self.module.progress.step < self.span(self.module.progress.total)[0]
        for cell, fixed in zip(self.cells.values(), self._fixed(), strict=True):
            if warm or fixed:
                cell.alpha.grad = None

    def after_step(self, module: QuantModule) -> None:
        """Make the stated widths those of the most probable candidates."""
        if not self.over:
            for cell in self.cells.values():
                cell.follow()

    def _fixed(self) -> list[bool]:
        if not self.cells:
            return []
        found: list[bool] = torch.stack([cell.fixed for cell in self.cells.values()]).tolist()
        return found

    # -- fixing ------------------------------------------------------------------------------------------------

    def fix(self, due: int) -> None:
        """Fix the most certain open cells, so many that ``due`` are fixed, within the budgets."""
        if due <= int(self.state.fixed):
            return
        fixed = dict(zip(self.cells, self._fixed(), strict=True))
        settled = {name: int(self.cells[name].index) for name, is_fixed in fixed.items() if is_fixed}
        p = {name: cell.probabilities.tolist() for name, cell in self.cells.items() if not fixed[name]}
        order = most_certain_first({name: certainty(values, self.certainty) for name, values in p.items()})
        chosen = {name: int(self.cells[name].index) for name in order[: due - len(settled)]}
        found = repaired(
            chosen,
            p,
            lambda picks: self.within(self.at({**settled, **picks})),
            lambda picks: self.excess({**settled, **picks}),
        )
        for name, index in found.items():
            self.cells[name].fix(index)
            log.info("ssps: %s fixed at %d bits, p %.2f", name, int(self.cells[name].bits), p[name][index])
        forget_momenta(self.module.trainer.optimizers, [self.cells[name].alpha for name in found])
        self.state.fixed.fill_(due)
        if self.over:
            log.info("ssps: the search is over; cost %s", self.costs(Allocation.of(self.module.net)))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths in evaluation; while cells are open, how certain they are and the expected cost."""
        values = self.metrics()
        if not self.over:
            p = {name: cell.probabilities.tolist() for name, cell in self.cells.items()}
            values |= {f"ssps/certainty/{name}": certainty(each, self.certainty) for name, each in p.items()}
            values["ssps/entropy"] = sum(entropy(each) for each in p.values())
            values |= {f"ssps/expected_cost/{row}": ratio for row, ratio in enumerate(self.ratios().tolist())}
        values["ssps/open"] = float(len(self.cells) - int(self.state.fixed))
        pl_module.log_dict(values)

    # -- the end -----------------------------------------------------------------------------------------------

    def finalise(self, net: nn.Module) -> None:
        """Put plain quantizers of the decided widths in place; refuse an open search, and widths beyond the budget.

        Neither in a host that was rebuilt from a configuration alone: its numbers come later.
        """
        self.require_over()
        for name, quantizer in list(quantizers(net)):
            if isinstance(quantizer, SearchCell):
                replace_module(net, name, quantizer.present)
        if self.is_prepared:
            self.require_within(net)
