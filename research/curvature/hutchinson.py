"""Hutchinson's estimator for all diagonal blocks of a matrix at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Product = Callable[[list[Tensor]], Sequence[Tensor]]


def gradient_products(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> Product:
    """Products with the Hessian by ``tensors``, from the ``gradients`` (``create_graph=True``), as often as wanted."""

    def product(vectors: list[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(gradients, tensors, vectors, retain_graph=True, materialize_grads=True)

    return product


def block_samples(
    product: Product,
    tensors: Sequence[Tensor],
    probes: int,
    generator: torch.Generator,
    tolerance: float | None = None,
) -> Tensor:
    """Independent samples of the trace of every diagonal block, float64 (probes, number of tensors); their mean is it.

    ``Tr(H_ii) = E[z_i . (H z)_i]`` with Rademacher ``z``: one product per probe serves all blocks; the other blocks add
    variance but no bias (Hutchinson 1990).

    Args:
        product: ``H z``, from and to tensors in the shapes of ``tensors``.
        tensors: the blocks' variables; only shape, device and dtype count.
        probes: most probes.
        generator: CPU generator of the probes.
        tolerance: stop when no running mean moved by more than this share of itself; None takes all probes.
    """
    samples: list[Tensor] = []
    total = torch.zeros(len(tensors), dtype=torch.float64)
    for count in range(1, probes + 1):
        signs = [
            (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).to(tensor.device, tensor.dtype)
            for tensor in tensors
        ]
        products = product(signs)
        samples.append(torch.stack([(z * p).sum().double().cpu() for z, p in zip(signs, products, strict=True)]))
        before, total = total / max(count - 1, 1), total + samples[-1]
        moved = (total / count - before).abs()
        if tolerance is not None and count > 1 and bool((moved <= tolerance * before.abs()).all()):
            break
    return torch.stack(samples)
