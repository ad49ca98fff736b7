"""The network as a graph, recorded from one forward pass: which leaf module read which module's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from research.quant.layers import QuantLayer, QuantOutput

INPUT = "input"


@dataclass(frozen=True)
class Node:
    """One call of a leaf module. Its output is the value of its own name.

    Attributes:
        name: the module's name in the network.
        module: the module.
        inputs: values that it read: names of nodes, or ``input``.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """All calls in order of execution.

    Attributes:
        nodes: the calls.
        output: name of the value that the network returned.
        input_shape: shape of the example input.
        output_shape: shape of the output for it.
    """

    nodes: tuple[Node, ...]
    output: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def leaf_modules(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are one operation each: those without children, quantized layers and quantized outputs."""
    for name, child in net.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, QuantLayer | QuantOutput) or not any(child.children()):
            yield path, child
        else:
            yield from leaf_modules(child, f"{path}.")


@torch.no_grad()
def record_graph(net: nn.Module, example: Tensor) -> Graph:
    """Run ``net`` once on ``example`` and match the tensors between its leaf modules by identity.

    Args:
        net: a network whose every operation is a module, in the mode to record.
        example: one batch of inputs.

    Raises:
        ValueError: a tensor that no leaf module made (a bare operation in some ``forward``), or a module called twice.
    """
    nodes: list[Node] = []
    producer: dict[int, str] = {id(example): INPUT}
    alive: list[Any] = [example]  # a freed tensor's id could be given to another one

    def source(value: Any, consumer: str) -> str:
        if id(value) not in producer:
            raise ValueError(
                f"{consumer} reads a tensor that no module made: models name every operation as a module "
                "(nn.ReLU, nn.Flatten, research.models.blocks.Add ...), also the residual add"
            )
        return producer[id(value)]

    def before(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if any(node.name == name for node in nodes):
            raise ValueError(f"{name} is called twice in one forward pass: give every call a module of its own")
        nodes.append(Node(name, module, tuple(source(value, name) for value in (*arguments, *keywords.values()))))

    def after(name: str, output: Any) -> None:
        producer[id(output)] = name
        alive.append(output)

    handles = []
    for name, module in leaf_modules(net):
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda m, a, y, name=name: after(name, y)))
    try:
        output = net(example)
    finally:
        for handle in handles:
            handle.remove()
    return Graph(tuple(nodes), source(output, "the network's output"), tuple(example.shape), tuple(output.shape))
