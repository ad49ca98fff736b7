"""BMPQ: bit-gradient sensitivity-driven mixed precision (Kundu, Wang, Sun, Beerel, Pedram, DATE 2022).

A reconstruction in parts: the paper's method section could not be read, see docs/methods/bmpq.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, SearchState
from callbacks.bmpq.assignment import ASSIGNS, Assign, bit_values, importance
from callbacks.bmpq.bit_gradients import NORMS, Norm, bit_norm, step_sensitivity
from callbacks.bmpq.widths import change_widths, require_uniform, weight_scale
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import budgets_from_config
from research.quant.ilp import allocate
from research.quant.layers import QuantLayer
from research.quant.quantizers.base import MAX_BITS
from research.quant.recipe import FLOAT_BITS

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
LEAST_BITS = 2


class Interval(SearchState):
    """What a search holds between two assignments: all of it is saved with the run.

    Attributes:
        sums: summed `step_sensitivity` of each layer since the last assignment.
        steps: how many are in a sum.
        assigned_at: optimizer step in front of which the last assignment was made; -1: none yet.
    """

    sums: Tensor
    steps: Tensor
    assigned_at: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(layers))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("assigned_at", torch.tensor(-1))

    def add(self, values: Tensor) -> None:
        """Count a step with these values, (layers,)."""
        self.sums += values
        self.steps += 1

    @property
    def mean(self) -> Tensor:
        """Mean over the steps, (layers,)."""
        return self.sums / self.steps

    def restart(self, step: int) -> None:
        """Begin a new interval in front of ``step``."""
        self.sums.zero_()
        self.steps.zero_()
        self.assigned_at.fill_(step)


class BMPQ(BitSearch):
    """Re-assigns bits at fixed times of the run: layers whose bits have large gradients keep more of them.

    Until the first assignment all layers have their widest candidate, whatever the budget. Then, at the end of every
    interval, an integer programme makes ``sum_l ENBG_l q_l`` as large as the budget allows, with ENBG the normalised
    bit gradient averaged over the steps of the interval (`callbacks.bmpq.bit_gradients`).

    Args:
        budget: one or several, see `research.quant.budget`.
        bits: candidate widths of the weights, 2 to 8.
        input_bits: ``same`` as the layer's weight, or one width.
        search_ends: choose the widths of the first and the last layer too, instead of leaving them as they are.
        norm: ``raw`` or ``per_bit``, see `step_sensitivity`.
        assign: ``sensitive``, or a control: ``inverted``, ``random``.
        warmup: part of the run in front of the first assignment.
        interval: part of the run between two assignments.
        until: part of the run after which the widths stay.
    """

    slug = "bmpq"
    state: Interval

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        bits: Sequence[int] = (2, 4),
        input_bits: int | Literal["same"] = "same",
        search_ends: bool = False,
        norm: Norm = "raw",
        assign: Assign = "sensitive",
        warmup: float = 0.1,
        interval: float = 0.1,
        until: float = 0.7,
    ) -> None:
        self.budgets = budgets_from_config(budget, "callbacks.bmpq.budget")
        if not bits or not all(isinstance(b, int) and LEAST_BITS <= b <= MAX_BITS for b in bits):
            raise ValueError(f"callbacks.bmpq.bits={bits}: use widths from {LEAST_BITS} to {MAX_BITS}, such as [2, 4]")
        if input_bits != "same" and (not isinstance(input_bits, int) or input_bits < 1):
            raise ValueError(f"callbacks.bmpq.input_bits={input_bits}: use same, or one width such as 8")
        if norm not in NORMS:
            raise ValueError(f"callbacks.bmpq.norm={norm}: use {' or '.join(NORMS)}")
        if assign not in ASSIGNS:
            raise ValueError(f"callbacks.bmpq.assign={assign}: use one of {', '.join(ASSIGNS)}")
        if not 0 <= warmup <= until < 1:
            raise ValueError(
                f"callbacks.bmpq: warmup={warmup}, until={until}: use parts of the run, warmup not above until, both "
                "from 0 to less than 1"
            )
        if not 0 < interval <= 1:
            raise ValueError(f"callbacks.bmpq.interval={interval}: use a part of the run, more than 0")
        self.bits = sorted(set(bits))
        self.input_bits = input_bits
        self.search_ends = search_ends
        self.norm = norm
        self.assign: Assign = assign
        self.warmup = warmup
        self.interval = interval
        self.until = until

    def attach(self, module: QuantModule) -> None:
        """Find the layers and give them their widest candidate."""
        self.layers = self.searched_layers(module.net)
        for name, layer in self.layers.items():
            require_uniform(name, layer)
        self.choices = self.choices_of(module.net, self._candidates)
        self.start_at_widest(module.net)
        self.state = Interval(len(self.layers))
        module.mechanics[self.slug] = self.state

    def _candidates(self, present: LayerBits) -> list[LayerBits]:
        """The candidates of one layer, the widest last; an input without a quantizer stays without."""
        if present.input == FLOAT_BITS:
            return [LayerBits(bits, FLOAT_BITS) for bits in self.bits]
        return [LayerBits(bits, bits if self.input_bits == "same" else self.input_bits) for bits in self.bits]

    def is_due(self, step: int, total: int) -> bool:
        """Whether an assignment stands in front of optimizer step ``step``, counted from 0, of ``total``."""
        first = max(1, round(self.warmup * total))
        every = max(1, round(self.interval * total))
        return first <= step <= max(first, round(self.until * total)) and (step - first) % every == 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Re-assign where it is time: behind the validation of the interval's end, in front of the next update."""
        step = trainer.global_step
        if self.is_due(step, self.module.progress.total) and int(self.state.assigned_at) != step:
            self.reassign(step)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Count the step's gradients, as backward left them: averaged over processes, not clipped, not decayed."""
        self.state.add(torch.stack([sensitivity(layer) for layer in self.layers.values()]))

    def enbg(self, norm: Norm) -> Tensor:
        """Normalised bit gradients of the layers, averaged over the interval so far, (layers,)."""
        mean = self.state.mean
        if norm == "per_bit":
            return mean
        present = Allocation.of(self.module.net)
        return mean * mean.new_tensor([bit_norm(present[name].weight) for name in self.layers])

    def reassign(self, step: int) -> None:
        """Solve the integer programme with the interval's gradients and begin a new interval."""
        net = self.module.net
        values = importance(self.enbg(self.norm), self.assign, self.rng(step)).tolist()
        objective = bit_values(dict(zip(self.layers, values, strict=True)), self.choices)
        found = allocate(objective, self.counts, self.budgets, current=Allocation.of(net))
        changed = change_widths(net, found)
        self.state.restart(step)
        log.info("bmpq: %d of %d layers changed their widths; cost %s", changed, len(self.layers), self.costs(found))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the widths and the bit gradients of the interval so far, in both norms."""
        values = self.metrics()
        for norm in NORMS:
            found = zip(self.layers, self.enbg(norm).tolist(), strict=True)
            values |= {f"{self.slug}/enbg_{norm}/{name}": value for name, value in found}
        pl_module.log_dict(values)

    def finalise(self, net: nn.Module) -> None:
        """Nothing is left to turn into something else; a network that is not within its budget is refused.

        Not in a host that was rebuilt from a configuration alone: its numbers come later.
        """
        if not self.is_prepared:
            return
        if int(self.state.assigned_at) < 0:
            raise ValueError(
                "callbacks.bmpq: these weights are of the warm-up, before any widths were assigned; use "
                "finalise.weights=last, and a run of two steps or more"
            )
        self.require_within(net)


def sensitivity(layer: QuantLayer) -> Tensor:
    """`step_sensitivity` of a layer after its backward pass, float32; 0 for a weight that the loss did not see."""
    gradient = layer.weight.grad
    scale = weight_scale(layer)
    return scale.new_zeros(()) if gradient is None else step_sensitivity(gradient, scale)
