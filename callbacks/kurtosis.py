"""KURE: kurtosis regularisation ("Robust Quantization: One Model to Rule Them All", Chmiel et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from research.learning.double_backward import layer_weights
from research.learning.evaluation import Evaluation, Objective, State
from research.learning.mechanic import Mechanic

if TYPE_CHECKING:
    from research.learning.module import QuantModule

UNIFORM = 1.8
TINY = 1e-30


def kurtosis(w: Tensor) -> Tensor:
    """``mean(((w - mu) / sigma)^4)`` with the population's moments; 0-dim. 1.8 for uniform data, 3 for Gaussian."""
    squares = (w - w.mean()).square()
    return (squares / torch.clamp(squares.mean(), min=TINY)).square().mean()


def kurtosis_loss(weights: Sequence[Tensor], target: float) -> Tensor:
    """``(1 / L) sum_l (kurtosis(w_l) - target)^2`` over the L ``weights``; 0-dim."""
    return torch.stack([(kurtosis(w) - target).square() for w in weights]).mean()


class Kurtosis(Mechanic):
    """Pull the distribution of every layer's latent weights towards a uniform one: `kurtosis_loss`.

    Uniform weights lose the least when they are rounded at a width or with a scale that training did not know. All
    trained weights of convolutions and linear layers take part, whether quantized or not.

    Args:
        strength: lambda; 0 is plain training, bit for bit.
        target: kurtosis to reach.
    """

    slug = "kurtosis"
    stage = "inner"

    def __init__(self, strength: float = 1.0, target: float = UNIFORM) -> None:
        if strength < 0:
            raise ValueError(f"callbacks.kurtosis.strength={strength}: use 0 or more")
        if target < 1:
            raise ValueError(f"callbacks.kurtosis.target={target}: no data has less than 1; use 1.8, that of uniform")
        self.strength = strength
        self.target = target
        self.regularised: list[str] = []

    def attach(self, module: QuantModule) -> None:
        """Find the weights."""
        self.regularised = layer_weights(module.net)
        if not self.regularised:
            raise ValueError("callbacks.kurtosis: no trained weight of a convolution or linear layer; drop kurtosis")

    def wrap_objective(self, objective: Objective) -> Objective:
        """The loss with the term ``kurtosis``, at the weights of the evaluation."""

        def regularised(batch: Any, state: State | None = None) -> Evaluation:
            evaluation = objective(batch, state)
            if self.strength == 0:
                return evaluation
            values = {**dict(self.module.net.named_parameters()), **(state or {})}
            term = kurtosis_loss([values[name] for name in self.regularised], self.target)
            return evaluation.plus(self.slug, self.strength * term)

        return regularised
