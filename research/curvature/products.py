"""Products of curvature matrices with a vector, on one batch: Hessian, generalised Gauss-Newton, empirical Fisher.

With the loss ``L = mean_i l(f_i, y_i)`` of outputs ``f = f(moves)``, J the derivative of all outputs by the moves:

==========  ====================================================  ==================================================
Hessian     ``d^2 L / d moves^2``                                 double backward (Pearlmutter 1994)
GGN         ``J' (d^2 L / df^2) J`` (Schraudolph 2002)            forward mode, small double backward, backward
Fisher      ``mean_i g_i g_i'``, ``g_i = J_i' (dl_i / df_i)``     forward mode, backward (true labels: *empirical*)
==========  ====================================================  ==================================================

None holds a gradient per sample: the memory is that of a few backward passes, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from research.curvature.sharpness import Loss
from research.learning.evaluation import Network

Moves = Mapping[str, Tensor]
"""Tensors by parameter name: a point relative to the network's own, or a direction."""

Evaluate = Callable[[Moves, Callable[[Network], Tensor]], Tensor]
"""``evaluate(moves, function)``: what ``function`` makes of the network moved by ``moves``."""

Product = Callable[[Evaluate, Loss, Any, Moves], dict[str, Tensor]]
"""``(evaluate, loss, batch, direction) -> product``, in the shapes of the direction."""


@dataclass(frozen=True)
class HessianGraph:
    """The first derivatives of a batch's mean loss, with their graph: every product is one more backward pass.

    Attributes:
        moves: the variables, at zero.
        gradients: the loss's derivative by each.
    """

    moves: dict[str, Tensor]
    gradients: tuple[Tensor, ...]

    def times(self, direction: Moves) -> dict[str, Tensor]:
        """The Hessian times ``direction``; zeros where the gradient is constant."""
        varying = [name for name, g in zip(self.moves, self.gradients, strict=True) if g.requires_grad]
        if not varying:
            return {name: torch.zeros_like(move) for name, move in self.moves.items()}
        outputs = [g for g in self.gradients if g.requires_grad]
        vectors = [direction[name] for name in varying]
        found = torch.autograd.grad(
            outputs, list(self.moves.values()), vectors, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.moves, found, strict=True))


def hessian_graph(evaluate: Evaluate, loss: Loss, batch: Any, like: Moves) -> HessianGraph:
    """The first derivatives by moves in the shapes of ``like``."""
    moves = _leaves(like)
    value = evaluate(moves, lambda network: loss(network, batch))
    return HessianGraph(moves, torch.autograd.grad(value, list(moves.values()), create_graph=True))


def hessian_product(evaluate: Evaluate, loss: Loss, batch: Any, direction: Moves) -> dict[str, Tensor]:
    """Hessian of the batch's mean loss times ``direction``."""
    return hessian_graph(evaluate, loss, batch, direction).times(direction)


def ggn_product(evaluate: Evaluate, loss: Loss, batch: Any, direction: Moves) -> dict[str, Tensor]:
    """Generalised Gauss-Newton matrix of the batch's mean loss times ``direction``."""
    outputs, slopes = _slopes(evaluate, batch, direction)
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(_loss_of(outputs, loss, batch), outputs, create_graph=True)
    (curved,) = torch.autograd.grad(gradient, outputs, slopes)
    return _pulled_back(evaluate, batch, direction, curved)


def fisher_product(evaluate: Evaluate, loss: Loss, batch: Any, direction: Moves) -> dict[str, Tensor]:
    """Empirical Fisher matrix of the batch times ``direction``; the loss is a mean of one term per sample."""
    outputs, slopes = _slopes(evaluate, batch, direction)
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(_loss_of(outputs, loss, batch), outputs)
    samples = len(gradient)
    own = samples * gradient.flatten(1)
    along = (own * slopes.flatten(1)).sum(1, keepdim=True)
    return _pulled_back(evaluate, batch, direction, (own * along / samples).reshape_as(gradient))


def _leaves(direction: Moves) -> dict[str, Tensor]:
    return {name: torch.zeros_like(vector, requires_grad=True) for name, vector in direction.items()}


def _slopes(evaluate: Evaluate, batch: Any, direction: Moves) -> tuple[Tensor, Tensor]:
    """Outputs of the network on a batch and their derivative along ``direction``, both detached."""

    def outputs(moves: dict[str, Tensor]) -> Tensor:
        return evaluate(moves, lambda network: network(batch[0]))

    zeros = {name: torch.zeros_like(vector) for name, vector in direction.items()}
    with torch.no_grad():
        found: tuple[Tensor, ...] = torch.func.jvp(outputs, (zeros,), (dict(direction),))
    return found[0].detach(), found[1].detach()


def _loss_of(outputs: Tensor, loss: Loss, batch: Any) -> Tensor:
    return loss(lambda *inputs: outputs, batch)


def _pulled_back(evaluate: Evaluate, batch: Any, direction: Moves, vector: Tensor) -> dict[str, Tensor]:
    """``J' vector``."""
    moves = _leaves(direction)
    outputs = evaluate(moves, lambda network: network(batch[0]))
    found = torch.autograd.grad(outputs, list(moves.values()), vector, materialize_grads=True)
    return dict(zip(moves, found, strict=True))
