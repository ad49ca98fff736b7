"""How much of a perturbation of latent weights reaches a quantized network, and how much of it points elsewhere.

The quantities of SAQ's motivation (Liu, Cai, Zhuang, arXiv 2111.12273): *diminishment*, ``Q(w + e) = Q(w)`` for almost
every weight, and *mismatch*, the gradient at the latent weight is not that at the quantized one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.curvature.sharpness import Loss, accumulated_gradients
from research.quant.layers import QuantLayer, quant_layers
from research.quant.passes import evaluating, weight_leaves
from research.quant.quantizers import Quantizer

Perturbation = Mapping[str, Tensor]
"""One tensor per layer, by layer name."""


def flipped_fraction(quantizer: Quantizer, weight: Tensor, perturbation: Tensor) -> float:
    """Share of the weights whose code changes: ``Q(w + e) != Q(w)``, 0 to 1.

    Args:
        quantizer: the weight's quantizer; none of its state moves.
        weight: what it quantizes, in its units.
        perturbation: ``e``, same shape and units.
    """
    with torch.no_grad():
        before, after = (quantizer.codes_ste(quantizer.transform(w)) for w in (weight, weight + perturbation))
        return float((before.round() != after.round()).double().mean())


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape, -1 to 1; 0 if one of them is zero."""
    a, b = one.detach().double().flatten(), other.detach().double().flatten()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else 0.0


def weight_gradients(net: nn.Module, loss: Loss, batches: Sequence[Any]) -> tuple[Perturbation, Perturbation]:
    """Gradients of the mean loss at the latent weights and at the quantized ones, in evaluation mode.

    Args:
        net: a converted network.
        loss: ``loss(network, batch)``, a mean over the batch.
        batches: ``(inputs, targets)`` each.
    """
    layers = _quantized_layers(net)
    with evaluating(net), weight_leaves(net) as offsets:
        leaves = {f"latent.{name}": layer.weight for name, layer in layers.items() if layer.weight.requires_grad}
        leaves |= {f"quantized.{name}": offsets[name] for name in layers}
        _, found = accumulated_gradients(net, loss, batches, leaves)
    latent = {name: found[f"latent.{name}"] for name in layers if f"latent.{name}" in found}
    return latent, {name: found[f"quantized.{name}"] for name in latent}


def flipped_fractions(net: nn.Module, perturbation: Perturbation) -> dict[str, float]:
    """`flipped_fraction` of every layer's own weight under ``perturbation``."""
    layers = _quantized_layers(net)
    fractions = {}
    for name, move in perturbation.items():
        quantizer = layers[name].weight_quantizer
        assert quantizer is not None
        fractions[name] = flipped_fraction(quantizer, layers[name].float_weight(), move)
    return fractions


def cosines(one: Perturbation, other: Perturbation) -> dict[str, float]:
    """`cosine` of every layer's two perturbations (or gradients: the radius does not matter)."""
    return {name: cosine(tensor, other[name]) for name, tensor in one.items()}


def _quantized_layers(net: nn.Module) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in quant_layers(net) if layer.weight_quantizer is not None}
