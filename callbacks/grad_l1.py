"""GRAD-L1: gradient l1 regularisation (Alizadeh, Behboodi, van Baalen, Louizos, Blankevoort, Welling, ICLR 2020).

"Gradient l1 Regularization for Quantization Robustness", arXiv 2002.07520; the weights' part of it, as recalled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from research.learning.double_backward import layer_weights, twice_differentiable
from research.learning.evaluation import Evaluation, Objective, State
from research.learning.mechanic import Mechanic
from research.learning.perturbation import named_gradients

if TYPE_CHECKING:
    from research.learning.module import QuantModule


def gradient_l1(gradients: Iterable[Tensor]) -> Tensor:
    """``sum |g|`` over all elements of all tensors; 0-dim, differentiable.

    To first order it bounds what a perturbation of at most ``d`` in every element can add to the loss:
    ``max <g, delta> = d ||g||_1`` over ``||delta||_inf <= d``. Rounding to a grid of step ``s`` has ``d = s / 2``.
    """
    return torch.stack([gradient.abs().sum() for gradient in gradients]).sum()


class GradL1(Mechanic):
    """Add ``strength * ||dL/dW||_1`` to the loss, ``W`` the weights of all convolutions and linear layers.

    One evaluation a step, differentiated twice.

    Args:
        strength: lambda; 0 is plain training, bit for bit.
    """

    slug = "grad_l1"
    stage = "outer"
    needs_double_backward = True
    ddp = "per_replica"

    def __init__(self, strength: float = 0.001) -> None:
        if strength < 0:
            raise ValueError(f"callbacks.grad_l1.strength={strength}: use 0 or more")
        self.strength = strength
        self.needs_double_backward = strength > 0
        self.penalised: list[str] = []

    def attach(self, module: QuantModule) -> None:
        """Find the weights."""
        self.penalised = layer_weights(module.net)
        if not self.penalised:
            raise ValueError("callbacks.grad_l1: no trained weight of a convolution or linear layer; drop grad_l1")

    def wrap_objective(self, objective: Objective) -> Objective:
        """The loss with the term ``grad_l1``."""

        def regularised(batch: Any, state: State | None = None) -> Evaluation:
            if self.strength == 0:
                return objective(batch, state)
            with twice_differentiable(self.module.net):
                evaluation = objective(batch, state)
            parameters = dict(self.module.net.named_parameters())
            weights = {name: parameters[name] for name in self.penalised}
            gradients = named_gradients(evaluation.loss, weights, create_graph=True)
            return evaluation.plus(self.slug, self.strength * gradient_l1(list(gradients.values())))

        return regularised
