"""The trace of the Hessian at the output of every quantizer, weights and inputs alike: which of them the loss minds."""

from __future__ import annotations

import torch
from torch import nn

from research.curvature.batches import FixedBatches, check_repeatable
from research.curvature.constants import constants
from research.curvature.estimates import Trace
from research.curvature.hutchinson import block_samples, gradient_products
from research.curvature.operators import require_eager
from research.curvature.progress import progress as bar
from research.curvature.quantized_tensors import recorded_outputs
from research.curvature.sharpness import Loss, shares
from research.learning.double_backward import twice_differentiable
from research.quant.passes import evaluating


def quantizer_traces(
    net: nn.Module, loss: Loss, batches: FixedBatches, probes: int = 30, seed: int = 0
) -> dict[str, Trace]:
    """Trace of the mean loss's Hessian by each de-quantized tensor, by quantizer name.

    A weight is one tensor for all samples, an input one for every batch: the traces of the batches add up, weighted by
    their sizes, and so do the variances of their estimates.

    Args:
        net: an eager converted network; evaluation mode, nothing of it moves.
        loss: ``loss(network, batch)``, a mean over the batch.
        batches: the data.
        probes: Hessian-vector products on every batch; all quantizers share them.
        seed: of the probes.

    Raises:
        ValueError: a compiled network, one without quantizers, a loss that is not repeatable, or too few probes.
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: use 2 or more, such as 30; the standard error needs two samples")
    require_eager(net)
    example = next(net.parameters())
    batches = batches.to(example.device, example.dtype)
    check_repeatable(net, loss, batches)
    generator = torch.Generator().manual_seed(seed)
    mean: dict[str, float] = {}
    variance: dict[str, float] = {}
    for batch, share in bar(shares(batches), "quantizer traces"):
        with constants(net), evaluating(net), twice_differentiable(net), recorded_outputs(net) as outputs:
            value = loss(net, batch)
        if not outputs:
            raise ValueError("per_quantizer=true: the network has no quantizers; use per_quantizer=false")
        tensors = list(outputs.values())
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        samples = block_samples(gradient_products(gradients, tensors), tensors, probes, generator)
        for name, column in zip(outputs, samples.T, strict=True):
            mean[name] = mean.get(name, 0.0) + share * float(column.mean())
            variance[name] = variance.get(name, 0.0) + share**2 * float(column.var() / probes)
    return {name: Trace(mean[name], variance[name] ** 0.5, probes * len(batches), seed) for name in mean}
