"""Sharpness of a quantized network as SAQ reports it: the true loss at a perturbed point less that at its own.

Surface: ``perturbation``. The ascent direction is the gradient at the quantized weights, as SAQ takes it. Other
measures at a finite radius are in `research.curvature.radius`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from research.learning.evaluation import Network, State
from research.learning.perturbation import (
    joint_norm,
    moved_parameters,
    named_gradients,
    qasam_perturbation,
    sam_perturbation,
)
from research.quant.kinds import BIASES, Kind, parameter_kinds
from research.quant.layers import quantized_weights
from research.quant.passes import evaluating, weight_leaves

PERTURBED: tuple[Kind, ...] = ("weight", "bias", "norm_weight", "norm_bias", "input_range")
"""What SAQ perturbs by default."""

Loss = Callable[[Network, Any], Tensor]
"""``loss(network, batch)``, 0-dim: a mean over the batch."""


@dataclass(frozen=True)
class Sharpness:
    """One measurement.

    Attributes:
        clean: mean loss of the network.
        perturbed: mean loss at the perturbed point.
        gradient_norm: joint norm of the mean gradient, to first order the rise per radius (SAM form, differentiable
            parts only).
    """

    clean: float
    perturbed: float
    gradient_norm: float

    @property
    def rise(self) -> float:
        """The sharpness: ``perturbed - clean``."""
        return self.perturbed - self.clean


def shares(batches: Sequence[Any]) -> list[tuple[Any, float]]:
    """Batches ``(inputs, targets)`` with the share of all samples that each holds.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("sharpness: no batches to measure on, give at least one")
    total = sum(len(targets) for _, targets in batches)
    return [(batch, len(batch[1]) / total) for batch in batches]


@torch.no_grad()
def mean_loss(network: Network, loss: Loss, batches: Sequence[Any]) -> float:
    """The mean loss over all samples, however they are cut into batches."""
    return sum(share * loss(network, batch).item() for batch, share in shares(batches))


def accumulated_gradients(
    network: Network, loss: Loss, batches: Sequence[Any], leaves: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all samples, and its gradient at the leaves that it depends on, by name."""
    mean, gradients = 0.0, dict[str, Tensor]()
    for batch, share in shares(batches):
        value = loss(network, batch)
        mean += share * value.item()
        for name, gradient in named_gradients(share * value, leaves).items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return mean, gradients


def network_at(net: nn.Module, state: State) -> Network:
    """``net`` with other parameters."""

    def network(*inputs: Tensor) -> Any:
        return functional_call(net, dict(state), inputs)

    return network


def saq_sharpness(
    net: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    rho: float,
    adaptive: bool = False,
    eta: float = 0.01,
    kinds: Collection[Kind] = PERTURBED,
) -> Sharpness:
    """``L(perturbed) - L(clean)`` in evaluation mode: one perturbation of joint norm ``rho`` for the whole set.

    The gradient is accumulated over all batches first (zhuang-group/SAQ), here weighted by their sizes, so that the
    result does not depend on how the set is cut. Quantized weights are perturbed behind their quantizers, other
    parameters where they stand. ``net`` is left as it was.

    Args:
        net: a converted network.
        loss: ``loss(network, batch)``, a mean over the batch; ``network`` is called with the inputs.
        batches: ``(inputs, targets)`` each.
        rho: radius, in units of the quantized weights; with ``adaptive`` relative to them.
        adaptive: QASAM in place of the plain form.
        eta: its offset.
        kinds: which parameters are perturbed.

    Raises:
        ValueError: no batches.
    """
    named = {name: kind for name, kind in parameter_kinds(net).items() if kind in kinds}
    own = dict(net.named_parameters())
    leaves: dict[str, Tensor] = {n: own[n] for n, kind in named.items() if kind != "weight" and own[n].requires_grad}
    with evaluating(net):
        with weight_leaves(net) as offsets:
            if "weight" in kinds:
                leaves |= {f"{layer}.weight": offset for layer, offset in offsets.items()}
            clean, gradients = accumulated_gradients(net, loss, batches, leaves)
        plain = {name for name, kind in named.items() if kind in BIASES}
        weights = {f"{layer}.weight": weight for layer, weight in quantized_weights(net).items()}
        points = {**own, **weights}
        moves = qasam_perturbation(gradients, points, plain, rho, eta) if adaptive else sam_perturbation(gradients, rho)
        behind = {layer: moves.pop(f"{layer}.weight") for layer in offsets if f"{layer}.weight" in moves}
        moved = moved_parameters(net, None, moves)
        with weight_leaves(net, behind):
            perturbed = mean_loss(network_at(net, moved), loss, batches)
    return Sharpness(clean, perturbed, float(joint_norm(gradients)))
