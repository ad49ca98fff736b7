"""Convolution with its batch-norm folded in front of the weight quantizer: the weight that is quantized is the weight
that is deployed.

Strategies 1 to 4 of MQBench (Li et al., NeurIPS 2021, arXiv 2111.03759; numbering as recalled from the paper; strategy
4 as ModelTC/MQBench and torch's ``ConvBn2d`` run it). With running statistics ``mu, sigma`` and those of the batch
``mu_B, sigma_B`` all compute, in evaluation mode or with a frozen norm,
``conv(x, Q(w gamma/sigma)) + beta + (b - mu) gamma/sigma``; while training

========  ================================================================================
strategy  output
========  ================================================================================
1         the same; the running statistics never move
2         ``conv(x, Q(w gamma/sigma_B)) + beta + (b - mu_B) gamma/sigma_B``
3         ``conv(x, Q(w gamma/sigma)) sigma/sigma_B + beta + (b - mu_B) gamma/sigma_B``
4         ``BN(conv(x, Q(w gamma/sigma)) sigma/gamma + b)``, statistics of the quantized convolution
========  ================================================================================

In 2 and 3 ``mu_B`` and ``sigma_B`` are those of a second convolution with the float weight ``w``. Without a weight
quantizer 2, 3 and 4 are a convolution and an ordinary batch-norm. Strategy 0 is ``batchnorm.fold_pairs``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from research.quant.batchnorm import FoldedBatchNorm2d, Pairs, conv_and_norm, fold_batchnorm, fold_pairs, per_channel
from research.quant.layers import SLOTS, QuantConv2d, replace_module

FOLD_BN = (0, 1, 2, 3, 4)


class QuantConvBn2d(QuantConv2d):
    """A quantized convolution that folds the batch-norm after it into its weight.

    The norm's parameters and buffers stay under the norm's own name in the network, where a ``FoldedBatchNorm2d``
    holds them; this layer refers to it. ``norm.training`` decides between batch and running statistics.

    Args:
        layer: the layer it replaces; parameters and slots are taken over.
        norm: the batch-norm after it.
        strategy: 1 to 4, see the module's table.
    """

    def __init__(self, layer: QuantConv2d, norm: FoldedBatchNorm2d, strategy: int) -> None:
        super().__init__(layer)
        for slot in SLOTS:
            setattr(self, slot, getattr(layer, slot))
        self.training = layer.training
        self.strategy = strategy
        self._norm = (norm,)  # in a tuple: a reference, no submodule

    @property
    def norm(self) -> FoldedBatchNorm2d:
        """The batch-norm that is folded in."""
        return self._norm[0]

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance (C,)."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        return mean, var

    def fold(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Float weight and bias of the folded convolution for statistics ``mean`` and ``var`` (C,)."""
        norm = self.norm
        return fold_batchnorm(self.weight, self.bias, norm.weight, norm.bias, mean, var, norm.eps)

    def float_weight(self) -> Tensor:
        """The weight folded with the running statistics."""
        return self.fold(*self.running)[0]

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolution with a folded (quantized) weight and the bias folded with the running statistics."""
        return self.convolve(x, weight, self.fold(*self.running)[1])

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input, convolve and normalise by the strategy, quantize the output."""
        if self.strategy == 1 or not self.norm.training:
            return super().forward(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = {2: self._fold_batch, 3: self._correct, 4: self._normalise}[self.strategy](x)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _fold_batch(self, x: Tensor) -> Tensor:
        weight, bias = self.fold(*self._batch_statistics(x))
        return self.convolve(x, self.quantize_weight(weight), bias)

    def _correct(self, x: Tensor) -> Tensor:
        sigma = torch.sqrt(self.running[1] + self.norm.eps)  # before the batch moves it
        weight = self.quantized_weight()
        mean, var = self._batch_statistics(x)
        bias = self.fold(mean, var)[1]
        correction = sigma / torch.sqrt(var + self.norm.eps)
        y = self.convolve(x, weight, None)
        return (y * per_channel(correction, y[0]) + per_channel(bias, y[0])).to(y.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        factor = self.norm.weight / torch.sqrt(self.running[1] + self.norm.eps)
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        y = self.convolve(x, self.quantized_weight(), None)
        unscaled = y / per_channel(factor, y[0])
        if self.bias is not None:
            unscaled = unscaled + per_channel(self.bias, y[0])
        return nn.BatchNorm2d.forward(self.norm, unscaled).to(y.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) of the float convolution's output; moves the running statistics."""
        y = self.convolve(x, self.weight, self.bias)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        with torch.no_grad():
            norm, count = self.norm, y.numel() // y.shape[1]
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            running_mean, running_var = self.running
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype) * (count / (count - 1)), momentum)
        return mean, var

    def extra_repr(self) -> str:
        """Short form for ``print(net)``."""
        return f"{super().extra_repr()}, fold_bn={self.strategy}"  # type: ignore[no-untyped-call]


def fold_into_quant(net: nn.Module, conv_bn_pairs: Pairs, strategy: int) -> None:
    """Fold the batch-norms of a converted network by a strategy, in place; names in the state dict stay as they are.

    Strategy 0 folds the present statistics into the present weights for good (``fold_pairs``): the convolutions get a
    bias and the batch-norms vanish from the state dict.

    Args:
        net: a converted network, its quantizers not yet calibrated.
        conv_bn_pairs: names of (convolution, batch-norm), as ``structure().conv_bn`` gives them.
        strategy: 0 to 4.

    Raises:
        ValueError: unknown strategy, no pairs, or a pair that cannot be folded.
    """
    if strategy not in FOLD_BN:
        raise ValueError(f"quantizer.fold_bn={strategy}: use none, 0, 1, 2, 3 or 4")
    if not conv_bn_pairs:
        raise ValueError(f"quantizer.fold_bn={strategy}: the model states no (conv, batch-norm) pairs; use none")
    if strategy == 0:
        fold_pairs(net, conv_bn_pairs)
        return
    for conv_name, norm_name in conv_bn_pairs:
        layer, norm = conv_and_norm(net, conv_name, norm_name)
        assert isinstance(layer, QuantConv2d), "fold_into_quant needs a converted network"
        folded = FoldedBatchNorm2d(norm, frozen=strategy == 1)
        replace_module(net, norm_name, folded)
        replace_module(net, conv_name, QuantConvBn2d(layer, folded, strategy))


def freeze_batchnorm(net: nn.Module, frozen: bool = True) -> None:
    """Keep folded norms to their running statistics from now on, or (strategies 2 to 4) let them follow ``train()``.

    Raises:
        ValueError: the network has no folded batch-norm.
    """
    layers = [module for module in net.modules() if isinstance(module, QuantConvBn2d)]
    if not layers:
        raise ValueError("freeze_batchnorm: no folded batch-norm; use quantizer.fold_bn=2, 3 or 4")
    for layer in layers:
        layer.norm.frozen = frozen or layer.strategy == 1
        layer.norm.train(layer.training)


@torch.no_grad()
def merge_batchnorm(net: nn.Module) -> None:
    """Turn every ``QuantConvBn2d`` into a ``QuantConv2d`` that computes exactly the same in evaluation mode, in place.

    For finalised networks: the folded weight becomes the parameter, the identity stands in the norm's place.
    """
    names = {module: name for name, module in net.named_modules()}
    for layer, name in names.items():
        if not isinstance(layer, QuantConvBn2d):
            continue
        weight, bias = layer.fold(*layer.running)
        merged = QuantConv2d(layer)
        merged.weight, merged.bias = nn.Parameter(weight), nn.Parameter(bias)
        for slot in SLOTS:
            setattr(merged, slot, getattr(layer, slot))
        merged.train(layer.training)
        replace_module(net, names[layer.norm], nn.Identity())
        replace_module(net, name, merged)
