"""Curvature of the loss at the de-quantized tensors themselves: weights and inputs alike, one number per quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from research.curvature.hutchinson import block_samples, gradient_products
from research.learning.double_backward import twice_differentiable
from research.quant.layers import quantizers


def block_traces(
    gradients: Sequence[Tensor],
    tensors: Sequence[Tensor],
    probes: int,
    tolerance: float,
    generator: torch.Generator,
) -> Tensor:
    """Hutchinson estimate of the trace of every diagonal block of a Hessian, (number of tensors,); see `block_samples`.

    Args:
        gradients: derivative of the loss by each tensor, with a graph of its own (``create_graph=True``).
        tensors: what the derivatives are taken by.
        probes: most probes.
        tolerance: stop when no running mean moved by more than this share of itself.
        generator: CPU generator of the probes.
    """
    return block_samples(gradient_products(gradients, tensors), tensors, probes, generator, tolerance).mean(0)


@contextmanager
def recorded_outputs(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of all quantizers by name, as the forward passes inside the block make them.

    One that depends on no parameter, such as that of the first input's quantizer with a fixed range, is made a leaf.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., Tensor]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return record

    handles = [quantizer.register_forward_hook(recorder(name)) for name, quantizer in quantizers(net)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def error_gradient_scales(
    net: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    generator: torch.Generator,
    probes: int = 50,
    tolerance: float = 1e-3,
) -> dict[str, Tensor]:
    """EWGS's Hessian-driven strength of gradient scaling, per unit of quantization error, by quantizer name (0-dim).

    ``max(0, mean over batches of (Tr(H) / N) / (3 std(g)))`` with ``g`` and ``H`` the loss's first and second
    derivative at the N elements of the de-quantized tensor (Lee, Kim, Ham 2021, equation 9; probes, tolerance and the
    mean over batches as in cvlab-yonsei/EWGS); 0 where all gradients are equal, as on a branch that a norm has switched
    off. Multiply by the width of a bin for errors in units of bins.

    Args:
        net: an eager converted network; its statistics move if it is in training mode, so hand over a copy.
        loss: of the network on a batch, 0-dim.
        batches: what ``loss`` takes.
        generator: CPU generator of the probes.
        probes: most probes per batch.
        tolerance: relative change of the running mean at which probing stops.
    """
    ratios: list[Tensor] = []
    names: list[str] = []
    for batch in batches:
        with twice_differentiable(net), recorded_outputs(net) as outputs:
            value = loss(net, batch)
        names, tensors = list(outputs), list(outputs.values())
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        traces = block_traces(gradients, tensors, probes, tolerance, generator)
        elements = torch.tensor([tensor.numel() for tensor in tensors])
        spread = torch.stack([gradient.detach().std().double().cpu() for gradient in gradients])
        ratios.append(torch.where(spread > 0, traces / elements / (3 * spread), 0.0))
    scales = torch.clamp(torch.stack(ratios).mean(0), min=0)
    return {name: scale for name, scale in zip(names, scales.float(), strict=True)}
