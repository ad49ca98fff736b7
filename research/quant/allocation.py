"""Bit allocation: the widths of every layer's weight and input. What a search finds and a recipe's table takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from research.quant.layers import quant_layers
from research.quant.quantizers import Quantizer, QuantizerSpec
from research.quant.quantizers.base import MAX_BITS
from research.quant.recipe import FLOAT_BITS, Table
from research.quant.widths import PerWidth, width_key

SLOTS = ("weight", "input")


class LayerBits(NamedTuple):
    """Widths of one layer: 0 is a pruned tensor, 32 no quantizer."""

    weight: int
    input: int

    def __str__(self) -> str:
        return f"W{self.weight}A{self.input}"


class Allocation(Mapping[str, LayerBits]):
    """Widths by layer name, in order of definition; immutable.

    Args:
        layers: ``(weight bits, input bits)`` of every layer.

    Raises:
        ValueError: a width that no quantizer has, naming layer and slot.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]]) -> None:
        for name, bits in layers.items():
            for slot, width in zip(SLOTS, bits, strict=True):
                whole = isinstance(width, int) and not isinstance(width, bool)
                if not whole or not (0 <= width <= MAX_BITS or width == FLOAT_BITS):
                    raise ValueError(
                        f"allocation.{name}.{slot}={width}: use 0 to {MAX_BITS}, or {FLOAT_BITS} for float"
                    )
        self._layers = {name: LayerBits(*bits) for name, bits in layers.items()}

    def __getitem__(self, name: str) -> LayerBits:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return hash(frozenset(self._layers.items()))

    def __repr__(self) -> str:
        return f"Allocation({', '.join(f'{name}: {bits}' for name, bits in self._layers.items())})"

    @classmethod
    def of(cls, net: nn.Module) -> Allocation:
        """The present widths of a converted network.

        Raises:
            ValueError: a tensor whose channels differ in width.
        """
        return cls(
            {
                name: (
                    _present(layer.weight_quantizer, f"{name}.weight"),
                    _present(layer.input_quantizer, f"{name}.input"),
                )
                for name, layer in quant_layers(net)
            }
        )

    @classmethod
    def from_table(cls, table: Table) -> Allocation:
        """The widths that a resolved recipe table gives."""
        return cls({name: (_stated(slots["weight"]), _stated(slots["input"])) for name, slots in table.items()})

    def table(self, base: Table) -> Table:
        """The recipe table with these widths; everything else is that of ``base``.

        Args:
            base: resolved table of the same network (``Recipe.resolve``): which quantizer each slot has.

        Raises:
            ValueError: other layers than in ``base``, or a width for a slot without a quantizer.
        """
        self.require_layers(base)
        return {
            name: {
                **slots,
                **{slot: _at(slots[slot], width, f"{name}.{slot}") for slot, width in self[name]._asdict().items()},
            }
            for name, slots in base.items()
        }

    def require_layers(self, names: Iterable[str]) -> None:
        """Raise ValueError, naming them, unless the allocation speaks of exactly the layers ``names``."""
        known = list(names)
        for name in self:
            if name not in known:
                raise ValueError(f"allocation.{name}: the network has no such layer; it has {', '.join(known)}")
        if missing := [name for name in known if name not in self]:
            raise ValueError(f"allocation: {missing[0]} is missing; give widths for {', '.join(missing)}")

    def widths(self, net: nn.Module) -> dict[str, int]:
        """The widths by quantizer name, as ``passes(net, bits=...)`` takes them, checked against ``net``.

        Raises:
            ValueError: other layers than in ``net``, a width that the quantizer there does not take, or one for a slot
                without a quantizer.
        """
        return {name: width for name, _, width in self._chosen(net)}

    @torch.no_grad()
    def apply(self, net: nn.Module) -> None:
        """Give ``net`` these widths for good, in place: its state holds them. Ranges stay as they are.

        Raises:
            ValueError: as ``widths``; or a quantizer with a state per width, which only ``passes`` selects.
        """
        chosen = list(self._chosen(net))
        for name, quantizer, _ in chosen:
            if isinstance(quantizer, PerWidth):
                raise ValueError(
                    f"allocation: {name} has a state for each of quantizer.widths; use quantizer.widths=[]"
                )
        for _, quantizer, width in chosen:
            quantizer.bits.fill_(width)

    def _chosen(self, net: nn.Module) -> Iterator[tuple[str, Quantizer, int]]:
        """Name, quantizer and new width of every quantizer of ``net`` on a weight or an input."""
        layers = dict(quant_layers(net))
        self.require_layers(layers)
        for name, layer in layers.items():
            for slot, quantizer in zip(SLOTS, (layer.weight_quantizer, layer.input_quantizer), strict=True):
                width = int(getattr(self[name], slot))
                if quantizer is not None:
                    _require_width(quantizer, width, f"{name}.{slot}")
                    yield f"{name}.{slot}_quantizer", quantizer, width
                elif width != FLOAT_BITS:
                    raise ValueError(f"allocation.{name}.{slot}={width}: there is no quantizer; use {FLOAT_BITS}")

    def metrics(self) -> dict[str, float]:
        """The widths by the name under which a search logs them: ``bits/<layer>.weight``, ``bits/<layer>.input``."""
        return {
            f"bits/{name}.{slot}": float(width) for name, bits in self.items() for slot, width in bits._asdict().items()
        }


def _present(quantizer: Quantizer | None, key: str) -> int:
    if quantizer is None:
        return FLOAT_BITS
    found = sorted(set(quantizer.bits.flatten().tolist()))
    if len(found) > 1 or found[0] != int(found[0]):
        raise ValueError(f"allocation.{key}: it has {found} bits; an allocation holds one whole width for a tensor")
    return int(found[0])


def _stated(spec: QuantizerSpec | None) -> int:
    return FLOAT_BITS if spec is None else spec.bits


def _at(spec: QuantizerSpec | None, width: int, key: str) -> QuantizerSpec | None:
    if width == FLOAT_BITS:
        return None
    if spec is None:
        raise ValueError(f"allocation.{key}={width}: the recipe has no quantizer there; use {FLOAT_BITS}")
    return spec.with_bits(width)


def _require_width(quantizer: Quantizer, width: int, key: str) -> None:
    if isinstance(quantizer, PerWidth):
        width_key(quantizer, quantizer.by_width, width)
        return
    least, most = quantizer.min_bits[quantizer.role], quantizer.max_bits
    if width and not least <= width <= most:
        raise ValueError(f"allocation.{key}={width}: {quantizer.spec.name} takes {least} to {most} bits there, or 0")
