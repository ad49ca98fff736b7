"""Budget: what a network may cost, stated one way for every method that chooses widths.

In a configuration: ``budget: {kind: average_bits, value: 3, convention: {first_last: excluded}}``, or a list of such.
The costs are those of `research.quant.cost`; what counts, the first and the last layer above all, says the convention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from research.quant.allocation import Allocation, LayerBits
from research.quant.cost import (
    FLOAT_BITS,
    LayerCost,
    apply_convention,
    average_weight_bits,
    bops,
    count_norm_parameters,
    input_memory,
    measure,
    size_bits,
)
from research.quant.cost_convention import CostConvention

Kind = Literal["average_bits", "size", "bops", "activation_memory", "activation_max"]
UNITS: dict[Kind, str] = {
    "average_bits": "bits per weight",
    "size": "bits of all weights",
    "bops": "bit operations for one sample",
    "activation_memory": "bits of all layers' inputs for one sample",
    "activation_max": "bits of the largest layer input for one sample",
}
KEYS = ("kind", "value", "convention")

Choices = Mapping[str, Sequence[LayerBits]]
"""Candidate widths by layer; a layer with one of them is fixed."""


@dataclass(frozen=True)
class Counts:
    """What the cost of any allocation of one network is computed from.

    Attributes:
        layers: the measured layers; their own bits do not matter.
        first, last: names of the layer that reads the image and of the one that writes the logits.
        norm_parameters: scales and shifts of batch-norms.
    """

    layers: tuple[LayerCost, ...]
    first: str
    last: str
    norm_parameters: int = 0

    @classmethod
    def of(cls, net: nn.Module, input_shape: Sequence[int], first: str, last: str) -> Counts:
        """Measure ``net`` at the shape of one sample, (C, H, W); converted, where its scales are to be counted."""
        return cls(measure(net, input_shape), first, last, count_norm_parameters(net))

    def at(self, allocation: Allocation) -> tuple[LayerCost, ...]:
        """The layers at the widths of an allocation.

        Raises:
            ValueError: the allocation is one of another network.
        """
        allocation.require_layers(layer.name for layer in self.layers)
        return tuple(
            replace(
                layer,
                weight_bits=torch.tensor(float(allocation[layer.name].weight)),
                input_bits=torch.tensor(float(allocation[layer.name].input)),
            )
            for layer in self.layers
        )


@dataclass(frozen=True)
class Budget:
    """The most that a network may cost.

    Args:
        kind: ``average_bits`` (of the weights), ``size`` (bits), ``bops``, ``activation_memory`` (bits of all layers'
            inputs for one sample, each counted once per layer that reads it) or ``activation_max`` (bits of the
            largest).
        value: the most, in the unit of the kind (`UNITS`).
        convention: what counts how.
        key: where the budget stands in the configuration, for messages.

    Raises:
        ValueError: an unknown kind or no positive number, naming the key.
    """

    kind: Kind
    value: float
    convention: CostConvention = field(default_factory=CostConvention)
    key: str = field(default="budget", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise ValueError(f"{self.key}.kind={self.kind}: use one of {', '.join(get_args(Kind))}")
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not 0 < self.value < math.inf:
            raise ValueError(f"{self.key}.value={self.value}: use a positive number of {UNITS[self.kind]}")

    @classmethod
    def from_config(cls, config: Any, key: str = "budget") -> Budget:
        """Read ``{kind: ..., value: ..., convention: {...}}``; the convention may be left out.

        Raises:
            ValueError: anything else, naming the key.
        """
        if not isinstance(config, Mapping) or not {"kind", "value"} <= set(config) <= set(KEYS):
            raise ValueError(f"{key}={config}: use {{kind: average_bits, value: 3}}, with 'convention' where needed")
        convention = config.get("convention") or {}
        known = [entry.name for entry in fields(CostConvention)]
        if not isinstance(convention, Mapping):
            raise ValueError(f"{key}.convention={convention}: use settings such as {{first_last: excluded}}")
        for name in convention:
            if name not in known:
                raise ValueError(f"{key}.convention.{name} is unknown: use one of {', '.join(known)}")
        try:
            stated = CostConvention(**convention)
        except ValueError as error:
            raise ValueError(f"{key}.convention.{str(error).removeprefix('cost.')}") from None
        return cls(config["kind"], config["value"], stated, key)

    @property
    def additive(self) -> bool:
        """Whether the cost is a sum over layers; else it is their maximum."""
        return self.kind != "activation_max"

    def cost(self, counts: Counts, allocation: Allocation) -> float:
        """The cost of a network at an allocation, in the budget's unit."""
        return float(self.cost_of(counts, counts.at(allocation)))

    def cost_of(self, counts: Counts, layers: Sequence[LayerCost]) -> Tensor:
        """The cost of ``layers`` at their own widths, which may have gradients; 0-dim.

        Weights whose width differs by channel, bits of shape (n,), cost their number times the mean.
        """
        counted = self.counted(counts, layers)
        if self.kind == "average_bits":
            return average_weight_bits(counted)
        return self._total(counted) + self._constant(counts)

    def met(self, counts: Counts, allocation: Allocation) -> bool:
        """Whether an allocation is within the budget."""
        return self.cost(counts, allocation) <= self.value

    def feasible(self, counts: Counts, choices: Choices) -> tuple[float, float]:
        """The least and the greatest cost that the choices allow."""
        shares = self.shares(counts, choices)
        ends = []
        for end in (min, max):
            picked = {name: end(range(len(shares[name])), key=shares[name].__getitem__) for name in choices}
            ends.append(self.cost(counts, Allocation({name: choices[name][index] for name, index in picked.items()})))
        return ends[0], ends[1]

    def require(self, counts: Counts, choices: Choices) -> None:
        """Raise ValueError, saying what is feasible, where no choice is within the budget."""
        low, high = self.feasible(counts, choices)
        if low > self.value:
            raise ValueError(f"{self.key}.value={self.value:.12g}: feasible are {self.shown(low, high)}")

    def shown(self, low: float, high: float) -> str:
        """A range of costs in words, rounded up, so that the least value named is feasible."""
        digits = 1e4 if self.kind == "average_bits" else 1
        ends = [f"{math.ceil(value * digits) / digits:.12g}" for value in (low, high)]
        return f"{ends[0]} to {ends[1]} {UNITS[self.kind]}"

    def shares(self, counts: Counts, choices: Choices) -> dict[str, list[float]]:
        """What each choice of each layer adds, in bits or bit operations; 0 where a layer does not count.

        An additive cost is within the budget exactly if the shares of the chosen widths sum to `limit` at most, another
        if none is above it.
        """
        found = {name: [0.0] * len(options) for name, options in choices.items()}
        for column in range(max(len(options) for options in choices.values())):
            allocation = Allocation({name: options[min(column, len(options) - 1)] for name, options in choices.items()})
            for layer in self.counted(counts, counts.at(allocation)):
                if column < len(found[layer.name]):
                    found[layer.name][column] = float(self._total([layer]))
        return found

    def limit(self, counts: Counts) -> float:
        """The most that `shares` may come to."""
        if self.kind == "average_bits":
            whole = Allocation({layer.name: (FLOAT_BITS, FLOAT_BITS) for layer in counts.layers})
            return self.value * sum(layer.weights for layer in self.counted(counts, counts.at(whole)))
        return self.value - self._constant(counts)

    def counted(self, counts: Counts, layers: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
        """Those of ``layers`` that count, at the widths at which they count."""
        found = apply_convention(layers, self.convention, counts.first, counts.last)
        if not found:
            raise ValueError(f"{self.key}.convention.first_last=excluded: no layer is left that counts; use all")
        return found

    def _total(self, layers: Sequence[LayerCost]) -> Tensor:
        """The cost of some layers, all that is not by layer left out; of average bits the sum over the weights."""
        stated = self.convention
        if self.kind == "average_bits":
            return size_bits(layers)
        if self.kind == "size":
            return size_bits(layers, stated.count_biases, stated.count_ranges)
        if self.kind == "bops":
            return bops(layers, stated.form)
        return input_memory(layers, "sum" if self.additive else "max")

    def _constant(self, counts: Counts) -> float:
        """What of the cost no layer has."""
        counted = self.kind == "size" and self.convention.count_norms
        return float(size_bits([], norm_parameters=counts.norm_parameters)) if counted else 0.0


def budgets_from_config(config: Any, key: str = "budget") -> list[Budget]:
    """One budget, or a list of budgets that all hold.

    Raises:
        ValueError: a malformed or empty one, naming the key.
    """
    if isinstance(config, Mapping):
        return [Budget.from_config(config, key)]
    if not isinstance(config, Sequence) or isinstance(config, str) or not config:
        raise ValueError(f"{key}={config}: use {{kind: average_bits, value: 3}} or a list of such")
    return [Budget.from_config(entry, f"{key}[{index}]") for index, entry in enumerate(config)]


def require_budgets(budgets: Sequence[Budget], counts: Counts, allocation: Allocation) -> None:
    """Raise ValueError where a finished search is not within its budgets: they are checked at the hard widths."""
    for budget in budgets:
        if not budget.met(counts, allocation):
            cost = budget.cost(counts, allocation)
            raise ValueError(
                f"{budget.key}.value={budget.value:.12g}: the widths cost {cost:.12g} {UNITS[budget.kind]}"
            )


def cost_metrics(budgets: Sequence[Budget], cost: Callable[[Budget], float]) -> dict[str, float]:
    """Costs by the name under which a search logs them: ``cost/<kind>``, a second one of a kind ``cost/<kind>_2``."""
    values: dict[str, float] = {}
    for number, budget in enumerate(budgets):
        alike = sum(other.kind == budget.kind for other in budgets[:number])
        values[f"cost/{budget.kind}{f'_{alike + 1}' if alike else ''}"] = cost(budget)
    return values
