"""Base of the mechanics that choose the widths of layers within a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from research.learning.mechanic import Claim, Mechanic
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Choices, Counts, cost_metrics, require_budgets
from research.quant.layers import QuantLayer, quant_layers
from research.runs.allocation import ALLOCATION, write_allocation
from research.runs.logger import written_folders

log = logging.getLogger(__name__)


class SearchState(nn.Module):
    """What a search keeps in checkpoints; a mechanic adds its own buffers.

    Attributes:
        input_shape: (C, H, W) of one sample, on which costs depend; 0 in a host that no run has prepared.
    """

    input_shape: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_shape", torch.zeros(3, dtype=torch.int64))


class EndingSearch(SearchState):
    """That of a search that decides all widths at one step.

    Attributes:
        over: whether the widths are decided.
    """

    over: Tensor

    def __init__(self, over: bool = False) -> None:
        super().__init__()
        self.register_buffer("over", torch.tensor(over))


class BitSearch(Mechanic):
    """Knows the layers, what their widths may be, and what an allocation costs.

    A subclass sets `budgets` and, where its search ends before the run does, `until` when it is made, and `layers`,
    `choices` and `state` when it is attached.

    Attributes:
        budgets: all of them hold in the end; may be empty.
        until: part of the run after which the widths are fixed.
        search_ends: whether the first and the last layer are searched too, instead of staying as they are.
        layers: the searched ones by name.
        choices: candidate widths of every layer of the network; a layer with one of them is fixed.
        state: what is saved with the run.
    """

    claims: frozenset[Claim] = frozenset({"bits"})
    budgets: Sequence[Budget]
    until: float
    search_ends: bool = False
    layers: dict[str, QuantLayer]
    choices: Choices
    state: SearchState
    _counts: Counts | None = None

    # -- construction ------------------------------------------------------------------------------------------

    def searched_layers(self, net: Any) -> dict[str, QuantLayer]:
        """The layers whose weights have a quantizer, by name.

        Raises:
            ValueError: there is none.
        """
        key, structure = f"callbacks.{self.slug}", net.structure()
        ends = () if self.search_ends else (structure.first, structure.last)
        found = {
            name: layer for name, layer in quant_layers(net) if layer.weight_quantizer is not None and name not in ends
        }
        if not found:
            raise ValueError(
                f"{key}: no quantized weight whose width could be chosen; use e.g. quantizer=lsq, or "
                f"{key}.search_ends=true where there are but a first and a last layer"
            )
        return found

    def choices_of(self, net: nn.Module, candidates: Callable[[LayerBits], Sequence[LayerBits]]) -> Choices:
        """``candidates(present)`` for the searched layers, the present widths for the others."""
        present = Allocation.of(net)
        return {name: candidates(bits) if name in self.layers else [bits] for name, bits in present.items()}

    def start_at_widest(self, net: nn.Module) -> None:
        """Give every layer the last of its choices.

        Raises:
            ValueError: a quantizer cannot have its first or its last width.
        """
        try:
            for end in (0, -1):
                allocation = Allocation({name: options[end] for name, options in self.choices.items()})
                allocation.widths(net)
            allocation.apply(net)
        except ValueError as error:
            raise ValueError(f"callbacks.{self.slug}: {error}") from None

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Note the size of an image, on which costs depend, and refuse a budget that no choice meets."""
        images, _ = next(iter(loader))
        self.state.input_shape.copy_(torch.tensor(images.shape[1:]))
        for budget in self.budgets:
            budget.require(self.counts, self.reachable)

    @property
    def reachable(self) -> Choices:
        """The choices that the search can end in."""
        return self.choices

    # -- costs -------------------------------------------------------------------------------------------------

    @property
    def is_prepared(self) -> bool:
        """Whether costs are known; they are not in a host that was rebuilt from a configuration alone."""
        return bool(self.state.input_shape.any())

    @property
    def counts(self) -> Counts:
        """What the cost of an allocation follows from."""
        if self._counts is None:
            structure = self.module.net.structure()
            shape = self.state.input_shape.tolist()
            self._counts = Counts.of(self.module.plain_copy().cpu(), shape, structure.first, structure.last)
        return self._counts

    def within(self, allocation: Allocation) -> bool:
        """Whether an allocation meets all budgets."""
        return all(budget.met(self.counts, allocation) for budget in self.budgets)

    def costs(self, allocation: Allocation) -> str:
        """What an allocation costs, in words for the log."""
        found = [f"{each.cost(self.counts, allocation):.6g} of {each.value:.6g}" for each in self.budgets]
        return ", ".join(found) or "without a budget"

    def metrics(self) -> dict[str, float]:
        """For the log: the present widths (``bits/<layer>.<slot>``) and what they cost (``cost/<kind of budget>``)."""
        found = self.found()
        return found.metrics() | cost_metrics(self.budgets, lambda budget: budget.cost(self.counts, found))

    # -- the end -----------------------------------------------------------------------------------------------

    def last_step(self, total: int) -> int:
        """The optimizer step, counted from 0, of ``total`` in front of which widths are fixed."""
        return max(1, min(total - 1, round(self.until * total)))

    def found(self) -> Allocation:
        """The allocation that the run ends with."""
        return Allocation.of(self.module.net)

    @property
    def over(self) -> bool:
        """Whether the widths are decided; those of a search without an end are at any time."""
        return bool(self.state.over) if isinstance(self.state, EndingSearch) else True

    def require_over(self) -> None:
        """Raise ValueError where a finished network would have widths that are not decided."""
        if self.is_prepared and not self.over:
            raise ValueError(
                f"callbacks.{self.slug}: these weights are of the search, before the widths were decided; use "
                "finalise.weights=last, and a run of two steps or more"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``allocation.yaml`` into the run folder, where there is one, unless the widths are undecided."""
        if not self.over:
            log.warning("callbacks.%s: the run ended before its search, without an allocation", self.slug)
            return
        for folder in written_folders(trainer):
            write_allocation(folder / ALLOCATION, self.found(), self.module.table)

    def require_within(self, net: nn.Module) -> None:
        """Raise ValueError where a finished network is beyond a budget; costs are known."""
        require_budgets(self.budgets, self.counts, Allocation.of(net))


def forget_momenta(optimizers: Iterable[Any], parameters: Iterable[nn.Parameter]) -> None:
    """Take what optimizers have gathered about parameters that are new ones now."""
    chosen = list(parameters)
    for optimizer in optimizers:
        for each in getattr(optimizer, "optimizers", [optimizer]):
            for parameter in chosen:
                each.state.pop(parameter, None)
