"""Peak activation memory: the working set of one sample, residuals that are still needed included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.quant.cost import FLOAT_BITS, LayerCost
from research.quant.passes import evaluating, passes
from research.quant.quantizers import Quantizer


@dataclass(frozen=True)
class Step:
    """One operation of a recorded forward pass; step ``k`` writes tensor ``k + 1``, tensor 0 is the image.

    Attributes:
        name: the module's name.
        reads: the tensors it reads.
        elements: elements of the tensor it writes, for one sample.
        bits: width of the module's output quantizer, None without one.
    """

    name: str
    reads: tuple[int, ...]
    elements: int
    bits: float | None


def peak_memory(net: nn.Module, input_shape: Sequence[int], layers: Sequence[LayerCost]) -> float:
    """``max over layers of (I ba + O ba_next + live residuals)`` in bits for one sample.

    A tensor has the width of the quantizer that writes it, else the greatest at which it is read: a layer reads at its
    input's bits, another module at the width of its own output; logits have 32. A tensor lives until its last reader;
    what stands between two layers (batch-norm, activation, add) works in place. Report-only: no gradient.

    Args:
        net: a network whose every operation is a named leaf module, called once.
        input_shape: shape of one sample, (C, H, W).
        layers: the layers that count, at the bits that count.

    Raises:
        ValueError: an operation that is no module.
    """
    steps = record_steps(net, input_shape)
    input_bits = {layer.name: float(layer.input_bits.mean()) for layer in layers}
    elements = [torch.Size(input_shape).numel(), *(step.elements for step in steps)]
    last_read = list(range(-1, len(steps)))
    read_at = [0.0] * len(elements)
    width = [float(FLOAT_BITS)] * len(elements)
    for position in reversed(range(len(steps))):
        step, written = steps[position], position + 1
        width[written] = step.bits or read_at[written] or FLOAT_BITS
        for index in step.reads:
            last_read[index] = max(last_read[index], position)
            read_at[index] = max(read_at[index], input_bits.get(step.name, width[written]))
    width[0] = read_at[0]
    working_sets = [
        sum(elements[index] * width[index] for index in range(position + 2) if last_read[index] >= position)
        for position, step in enumerate(steps)
        if step.name in input_bits
    ]
    return max(working_sets)


@torch.no_grad()
def record_steps(net: nn.Module, input_shape: Sequence[int]) -> list[Step]:
    """The operations of one forward pass in order; a layer with all its slots is one.

    Raises:
        ValueError: an operation that is no module.
    """
    parameter = next(net.parameters())
    tensors = [torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)]
    steps: list[Step] = []

    def hook(name: str, bits: float | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            reads = tuple(next((k for k, known in enumerate(tensors) if known is x), -1) for x in inputs)
            if -1 in reads:
                raise ValueError(f"peak memory: what {name} reads comes from no module; make every operation a module")
            steps.append(Step(name, reads, output.numel(), bits))
            tensors.append(output.view_as(output))  # another object, also where the module returns its input
            return tensors[-1]

        return record

    handles = [module.register_forward_hook(hook(name, bits)) for name, module, bits in _operations(net)]
    try:
        with evaluating(net), passes(net, mode="identity"):
            net(tensors[0])
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _operations(net: nn.Module) -> list[tuple[str, nn.Module, float | None]]:
    """Layers with all their slots, output quantizers, and all other modules without children."""
    found: list[tuple[str, nn.Module, float | None]] = []
    inside = ""
    for name, module in net.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, nn.Conv2d | nn.Linear | Quantizer) or not any(module.children()):
            quantizer = module if isinstance(module, Quantizer) else getattr(module, "output_quantizer", None)
            found.append((name, module, float(quantizer.bits.mean()) if isinstance(quantizer, Quantizer) else None))
            inside = f"{name}."
    return found
