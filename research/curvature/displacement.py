"""The true loss of a network some finite way off: where a displacement acts, from where, and what the loss is there.

Surface: ``perturbation``. Two *sites*. At ``quantized`` a weight is moved behind its quantizer, so that the displaced
weights leave the grid; at ``latent`` the latent weight is moved and then quantized, so that small moves may change
nothing. Evaluation mode throughout: batch-norm statistics are the running ones, and the network is left as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from research.curvature.sharpness import Loss, accumulated_gradients, mean_loss, network_at
from research.curvature.surface import WEIGHTS
from research.data.images import keyed_generator
from research.deploy.deployed import DeployedWeight
from research.learning.evaluation import Network
from research.learning.perturbation import moved_parameters
from research.quant.kinds import Kind, parameter_kinds
from research.quant.layers import quant_layers, quantized_weights
from research.quant.passes import evaluating, surrogate_gradients, weight_leaves

Site = Literal["quantized", "latent"]
SITES: tuple[Site, ...] = get_args(Site)

Named = Mapping[str, Tensor]
"""Tensors by the name of the parameter that they belong to."""


def centre(net: nn.Module, site: Site, kinds: Collection[Kind] = WEIGHTS) -> dict[str, Tensor]:
    """Copies of the tensors that are displaced, by parameter name.

    Args:
        net: a converted network.
        site: ``quantized``: a weight is what its layer computes with; ``latent``: it is the parameter.
        kinds: which parameters are displaced; others stay where they are.

    Raises:
        ValueError: an unknown site or kind, nothing of these kinds, or at ``latent`` a weight that its latent one no
            longer determines.
    """
    if site not in SITES:
        raise ValueError(f"site={site}: use one of {', '.join(SITES)}")
    if unknown := [kind for kind in kinds if kind not in get_args(Kind)]:
        raise ValueError(f"kinds={unknown[0]}: use some of {', '.join(get_args(Kind))}")
    named = parameter_kinds(net)
    points = {name: p.detach().clone() for name, p in net.named_parameters() if named[name] in kinds}
    if not points:
        raise ValueError(f"kinds={','.join(kinds)}: the network has no such parameters; use kinds=weight")
    if "weight" in kinds:
        for name, layer in quant_layers(net):
            quantizer = layer.weight_quantizer
            fixed = quantizer is not None and (isinstance(quantizer, DeployedWeight) or quantizer.owns_weight)
            if site == "latent" and fixed:
                raise ValueError(f"site=latent: the codes of {name} do not follow its latent weight; use quantized")
    if site == "quantized" and "weight" in kinds:
        points |= {_weight_name(layer): weight for layer, weight in quantized_weights(net).items()}
    return points


@contextmanager
def displaced(net: nn.Module, site: Site, moves: Named) -> Iterator[Network]:
    """``net`` in evaluation mode with ``moves`` added at ``site``; nothing is written, the moves may be leaves."""
    layers = {_weight_name(name): name for name, _ in quant_layers(net)} if site == "quantized" else {}
    behind = {layers[name]: move for name, move in moves.items() if name in layers}
    moved = moved_parameters(net, None, {name: move for name, move in moves.items() if name not in layers})
    with evaluating(net), weight_leaves(net, behind):
        yield network_at(net, moved)


def loss_at(net: nn.Module, loss: Loss, batches: Sequence[Any], site: Site, moves: Named) -> float:
    """The mean loss over ``batches`` with ``moves`` added at ``site``."""
    with displaced(net, site, moves) as network:
        return mean_loss(network, loss, batches)


def gradient_at(
    net: nn.Module, loss: Loss, batches: Sequence[Any], site: Site, moves: Named
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss with ``moves`` added at ``site``, and its derivative by every move.

    Rounding has the plain straight-through derivative, also where a quantizer's own rule depends on the gradient.
    """
    leaves = {name: move.detach().requires_grad_() for name, move in moves.items()}
    with displaced(net, site, leaves) as network, surrogate_gradients(net):
        mean, found = accumulated_gradients(network, loss, batches, leaves)
    return mean, {name: found.get(name, torch.zeros_like(move)) for name, move in moves.items()}


def random_direction(points: Named, seed: int, index: int) -> dict[str, Tensor]:
    """Gaussian tensors in the shapes of ``points``, independent in ``seed``, ``index`` and name.

    Drawn on the CPU and by name: networks of one architecture get the same direction, whatever their weights.
    """
    return {
        name: torch.randn(
            point.shape, generator=keyed_generator(seed, "direction", index, name), dtype=torch.float64
        ).to(point.device, point.dtype)
        for name, point in points.items()
    }


def _weight_name(layer: str) -> str:
    """The parameter name of a layer's weight; the network itself may be the layer."""
    return f"{layer}.weight".removeprefix(".")
