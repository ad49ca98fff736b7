"""Where quantizers work in the exported graph: as early as the numbers allow, so that a runtime finds integer kernels.

An integer kernel takes codes and gives codes, so the quantizer that a layer has on its input should stand at the
operation that makes this input. Three exact rules bring it there, each where nothing else reads what lies between:

* a quantizer is monotone, so it changes places with a max-pool, and with what only moves or drops values;
* a clip (ReLU is one) in front of it is a narrower clip on its codes: ``Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))``;
* zeros that pad its input become its zero point, as ``Q(0)`` is the zero point.

A batch-norm right behind a convolution with integer weights needs no node: its factor goes into the scales of the
output channels, the codes stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from research.deploy.affine import AffineCodes, affine_codes
from research.deploy.graph import Graph, Node
from research.deploy.weights import can_fold
from research.models.blocks import PadShortcut
from research.quant.layers import QuantConv2d, QuantLayer, QuantOutput
from research.quant.quantizers import Quantizer
from research.quant.quantizers.n2uq import N2UQ

MOVES = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity, PadShortcut)
"""Modules that move, drop or select values and make none but zeros."""


@dataclass(frozen=True)
class Wish:
    """A quantizer that a later module has, to work on an output at once.

    Attributes:
        name: what its nodes are called.
        quantizer: the quantizer.
        low, high: clips that lay between, as one.
    """

    name: str
    quantizer: Quantizer
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Placement:
    """What the exporter does differently from module after module.

    Attributes:
        wishes: by module, the quantizer that works on its output at once.
        crossed: modules that a quantizer went past: clips among them have no node, the others work on codes.
        norms: by convolution, the batch-norm that goes into its scales.
        merged: names of these batch-norms.
    """

    wishes: Mapping[str, Wish] = field(default_factory=dict)
    crossed: frozenset[str] = frozenset()
    norms: Mapping[str, nn.BatchNorm2d] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()


def place(graph: Graph) -> Placement:
    """The placement for a recorded network in deployed form."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    alone = {name: nodes[0] for name, nodes in readers.items() if len(nodes) == 1 and name != graph.output}
    norms, merged = _norms(graph, alone)
    wishes: dict[str, Wish] = {}
    crossed = set()
    for node in reversed(graph.nodes):
        reader = alone.get(node.name)
        if reader is None:
            continue
        wish = _own(reader)
        if wish is None:
            wish = wishes.get(reader.name) if reader.name in merged else _past(reader, wishes)
            if wish is not None and reader.name not in merged:
                crossed.add(reader.name)
        if wish is not None:
            wishes[node.name] = wish
    return Placement(wishes, frozenset(crossed), norms, frozenset(merged))


def clip_bounds(module: nn.Module) -> tuple[float, float] | None:
    """Bounds of a module that clips and does nothing else."""
    if isinstance(module, nn.Hardtanh):  # ReLU6 too
        return float(module.min_val), float(module.max_val)
    return (0.0, math.inf) if isinstance(module, nn.ReLU) else None


def movable_form(wish: Wish) -> AffineCodes | None:
    """The form of a quantizer that is one QuantizeLinear and one DequantizeLinear, with a code for zero."""
    if isinstance(wish.quantizer, N2UQ):
        return None
    form = affine_codes(wish.quantizer, wish.name)
    return None if form.shift or form.offset else form


def _norms(graph: Graph, alone: Mapping[str, Node]) -> tuple[dict[str, nn.BatchNorm2d], set[str]]:
    norms, merged = {}, set()
    for node in graph.nodes:
        reader = alone.get(node.name)
        if reader is None or type(reader.module) is not nn.BatchNorm2d or not isinstance(node.module, QuantConv2d):
            continue
        if can_fold(node.module, reader.module):
            norms[node.name] = reader.module
            merged.add(reader.name)
    return norms, merged


def _own(node: Node) -> Wish | None:
    """The quantizer on the input of a layer, if its form lets it move."""
    if isinstance(node.module, QuantLayer) and isinstance(node.module.input_quantizer, Quantizer):
        wish = Wish(f"{node.name}.input", node.module.input_quantizer)
        return wish if movable_form(wish) else None
    return None


def _past(node: Node, wishes: Mapping[str, Wish]) -> Wish | None:
    """The quantizer behind a module with one input, brought in front of it."""
    module, wish = node.module, wishes.get(node.name)
    if isinstance(module, QuantOutput):
        wish, module = Wish(f"{node.name}.output", module.output_quantizer), module.module
    if wish is None or movable_form(wish) is None:
        return None
    if bounds := clip_bounds(module):
        low, high = (min(max(bound, wish.low), wish.high) for bound in bounds)
        return Wish(wish.name, wish.quantizer, low, high)
    keeps_zero = wish.low <= 0 <= wish.high
    return wish if isinstance(module, MOVES) and (keeps_zero or not isinstance(module, PadShortcut)) else None
