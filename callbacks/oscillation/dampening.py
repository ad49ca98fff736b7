"""Oscillation dampening: latent weights are pulled to the centre of their bin (Nagel et al., ICML 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.oscillation.schedule import annealed, check_warmup
from research.learning.evaluation import Evaluation, Objective, State, under_state
from research.learning.mechanic import Mechanic
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers.base import Quantizer
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.minmax import MinMax

if TYPE_CHECKING:
    from research.learning.module import QuantModule

Aggregation = Literal["kernel_mean", "sum", "mean"]


def dampening_loss(
    weight: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor, aggregation: Aggregation = "kernel_mean"
) -> Tensor:
    """``|| w_hat - clip(w, s qmin, s qmax) ||^2`` with ``w_hat`` a constant; 0-dim.

    arXiv 2203.11086, the section on dampening; the aggregations are those of the official code. The gradient of each
    element is ``2 (w - w_hat)`` inside the range and 0 outside, none reaches the scale.

    Args:
        weight: latent weight (C, ...).
        scale: s, broadcasts against the weight.
        qmin, qmax: limits of the codes.
        aggregation: ``sum`` over all elements (the paper's formula), ``mean``, or ``kernel_mean`` (the code's default):
            summed over the first axis, averaged over the others.
    """
    scale = scale.detach()
    quantized = torch.clamp(torch.round(weight.detach() / scale), qmin, qmax) * scale
    total = (quantized - torch.clamp(weight, scale * qmin, scale * qmax)).square().sum()
    return total / {"sum": 1, "mean": weight.numel(), "kernel_mean": weight[0].numel()}[aggregation]


class OscillationDampening(Mechanic):
    """Add ``strength * sum of dampening_loss`` over all quantized weights, 8-bit ones too, to the loss.

    Args:
        strength: lambda at the end of the run; with ``strength_start`` 0 too it is plain training, bit for bit.
        strength_start: lambda up to the end of the warm-up.
        warmup: part of the run before lambda moves, along a cosine.
        aggregation: ``kernel_mean``, ``sum`` or ``mean``; the published strengths belong to the first.
    """

    slug = "oscillation_dampening"

    def __init__(
        self,
        strength: float = 0.1,
        strength_start: float = 0.0,
        warmup: float = 0.25,
        aggregation: Aggregation = "kernel_mean",
    ) -> None:
        for name, value in (("strength", strength), ("strength_start", strength_start)):
            if value < 0:
                raise ValueError(f"callbacks.{self.slug}.{name}={value}: use 0 or more")
        check_warmup(self.slug, warmup)
        if aggregation not in get_args(Aggregation):
            raise ValueError(
                f"callbacks.{self.slug}.aggregation={aggregation}: use one of {', '.join(get_args(Aggregation))}"
            )
        self.strength = strength
        self.strength_start = strength_start
        self.warmup = warmup
        self.aggregation: Aggregation = aggregation
        self.current = strength_start
        self.layers: list[QuantLayer] = []

    def attach(self, module: QuantModule) -> None:
        """Find the layers with a quantized weight."""
        for name, layer in quant_layers(module.net):
            if layer.weight_quantizer is None:
                continue
            if not _on_the_latent_scale(layer.weight_quantizer):
                raise ValueError(
                    f"callbacks.{self.slug}: the {type(layer.weight_quantizer).__name__} quantizer of {name} has no "
                    "bins scale * code of the latent weight itself; use quantizer=lsq"
                )
            self.layers.append(layer)
        if not self.layers:
            raise ValueError(f"callbacks.{self.slug}: no layer has a quantized weight; use quantizer=lsq")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the step's strength."""
        self.current = annealed(
            trainer.global_step + 1, self.module.progress.total, self.strength_start, self.strength, self.warmup
        )

    def penalty(self) -> Tensor:
        """The sum of `dampening_loss` over all layers; 0-dim."""
        losses = [self._loss(layer, layer.weight_quantizer) for layer in self.layers if layer.weight_quantizer]
        return torch.stack(losses).sum()

    def wrap_objective(self, objective: Objective) -> Objective:
        """The loss with the term ``oscillation_dampening``, at the weights of the evaluation; none at strength 0."""

        def dampened(batch: Any, state: State | None = None) -> Evaluation:
            evaluation = objective(batch, state)
            if self.current == 0:
                return evaluation
            return evaluation.plus(self.slug, self.current * under_state(self.module.net, state or {}, self.penalty))

        return dampened

    def _loss(self, layer: QuantLayer, quantizer: Quantizer) -> Tensor:
        return dampening_loss(layer.float_weight(), quantizer.scale, *quantizer.limits(), self.aggregation)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the strength."""
        pl_module.log(f"{self.slug}/strength", self.current)


def _on_the_latent_scale(quantizer: Quantizer) -> bool:
    """Whether ``x_hat = scale * clip(round(x / scale))``, on the weight as it is."""
    return isinstance(quantizer, LSQ | MinMax) and quantizer.zero_point is None
