"""Entropy-aware bin regularization: phase 2 of SDQ (Huang et al., ICML 2022, arXiv 2206.04459).

Per bin as in Han et al., ICCV 2021; what the paper's text leaves unknown here is a reconstruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from research.learning.evaluation import Evaluation, Objective, State
from research.learning.mechanic import Mechanic
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers import Quantizer
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax
from research.quant.quantizers.n2uq import N2UQ

if TYPE_CHECKING:
    from research.learning.module import QuantModule

LINEAR = (LSQ, MinMax, N2UQ)
"""Weight quantizers whose values stand for the weight itself: those that transform it first have other levels."""


def per_bin_error(errors: Tensor, bins: Tensor, count: int) -> Tensor:
    """``mean(S_j - t_j)^2 + Var(S_j)`` of every bin (SDQ, equation 10), population variance: the bin's mean square.

    Args:
        errors: distance of every value from its level, any shape.
        bins: index of the level, int64, same shape; a constant to the gradient.
        count: number of bins.

    Returns:
        (count,); 0 for an empty bin. The derivative to a value is ``2 error / |S_j|``.
    """
    sizes = torch.bincount(bins.flatten(), minlength=count).to(errors.dtype)
    sums = torch.zeros_like(sizes).index_add(0, bins.flatten(), errors.flatten().square())
    return sums / torch.clamp(sizes, min=1)


def quantizer_bins(quantizer: Quantizer, w: Tensor) -> tuple[Tensor, Tensor, int]:
    """Errors of the weight ``w`` in units of the largest level, bins and their number; gradient to ``w`` alone.

    Levels and normalisation are the quantizer's own. With N2UQ that is SDQ's entropy-preserving form:
    ``2^(b-1) / (2^b - 1) * w / mean|w|`` against equidistant levels in [-1, 1]. Values that the quantizer clips belong
    to the outermost bins with their whole error.
    """
    codes = quantizer.codes(w.detach())  # first: the scale of some quantizers follows from the weight
    qmin, qmax = quantizer.limits()
    reach = (quantizer.scale * torch.clamp(torch.maximum(-qmin, qmax), min=1)).detach()
    errors = (w - quantizer.dequantize(codes).detach()) / reach
    step = 2 if quantizer.grid.kind == "midrise" else 1
    lowest, highest = int(qmin.min()), int(qmax.max())
    return errors, (codes.long() - lowest) // step, (highest - lowest) // step + 1


class BinRegularization(Mechanic):
    """Pull the latent weights of every quantized layer to the levels of their quantizer, every bin alike.

    The sum over layers and bins of `per_bin_error`. Every bin counts the same, however few weights it has.

    Args:
        strength: lambda_E; 0 is plain training, bit for bit.
    """

    slug = "bin_regularization"
    stage = "inner"

    def __init__(self, strength: float = 0.1) -> None:
        if strength < 0:
            raise ValueError(f"callbacks.bin_regularization.strength={strength}: use 0 or more, such as 0.1")
        self.strength = strength
        self.layers: dict[str, QuantLayer] = {}

    def attach(self, module: QuantModule) -> None:
        """Find the weight quantizers."""
        for name, layer in quant_layers(module.net):
            quantizer = layer.weight_quantizer
            if quantizer is None:
                continue
            if not isinstance(quantizer, LINEAR) or layer.float_weight() is not layer.weight:
                raise ValueError(
                    f"callbacks.bin_regularization: the levels of {name} ({type(quantizer).__name__}) are not those of "
                    "its weight; use quantizer=n2uq, lsq or minmax with fold_bn=none and widths=[]"
                )
            self.layers[f"{name}.weight"] = layer
        if not self.layers:
            raise ValueError("callbacks.bin_regularization: no quantized weight to regularise, use e.g. quantizer=n2uq")

    def penalty(self, state: State | None = None) -> Tensor:
        """The sum over all layers and bins, at the weights of ``state`` where it has them; 0-dim."""
        values = {**dict(self.module.net.named_parameters()), **(state or {})}
        terms = []
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            terms.append(per_bin_error(*quantizer_bins(layer.weight_quantizer, values[name])).sum())
        return torch.stack(terms).sum()

    def wrap_objective(self, objective: Objective) -> Objective:
        """The loss with the term ``bin_regularization``, at the weights of the evaluation."""

        def regularised(batch: Any, state: State | None = None) -> Evaluation:
            evaluation = objective(batch, state)
            if self.strength == 0:
                return evaluation
            return evaluation.plus(self.slug, self.strength * self.penalty(state))

        return regularised
