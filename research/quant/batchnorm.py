"""Batch-norm: re-estimating its running statistics, and folding it into the convolution before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from research.quant.layers import replace_module
from research.quant.passes import evaluating, passes

Pairs = Sequence[tuple[str, str]]


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch-norm whose arithmetic the convolution before it does: state under its own name, the identity as forward.

    Args:
        norm: the batch-norm it replaces, whose parameters and buffers it takes over.
        frozen: keep to the running statistics, whatever ``train()`` says.

    Raises:
        ValueError: ``norm`` has no affine parameters or no running statistics.
    """

    def __init__(self, norm: nn.BatchNorm2d, frozen: bool = False) -> None:
        if not (norm.affine and norm.track_running_stats):
            raise ValueError(
                "quantizer.fold_bn: a batch-norm without affine parameters or running statistics; use none"
            )
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.frozen = frozen
        self.train(norm.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training flag; a frozen norm stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: the convolution has normalised it."""
        return x


def fold_batchnorm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals a convolution and a batch-norm after it.

    ``w' = w gamma / sqrt(var + eps)``, ``b' = beta + (b - mean) gamma / sqrt(var + eps)`` (MQBench, Li et al. 2021,
    section on batch-norm folding). ``weight`` is (C, ...), everything else (C,); no bias counts as zero.
    """
    factor = gamma / torch.sqrt(var + eps)
    shift = -mean if bias is None else bias - mean
    return weight * per_channel(factor, weight), beta + shift * factor


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """``values`` (C,) in a shape that broadcasts over the first axis of ``weight`` (C, ...)."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def fold_pairs(net: nn.Module, pairs: Pairs) -> None:
    """Fold each batch-norm, with its running statistics, into its convolution; in its place stands the identity.

    In place. In evaluation mode the network computes the same as before; it trains the folded weights (strategy 0).

    Args:
        net: a network of convolutions and batch-norms; weight quantizers, if any, see the folded weight.
        pairs: names of (convolution, batch-norm), as ``structure().conv_bn`` gives them.

    Raises:
        ValueError: a pair that is no convolution and batch-norm with running statistics.
    """
    for conv_name, norm_name in pairs:
        conv, norm = conv_and_norm(net, conv_name, norm_name)
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = fold_batchnorm(
            conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
        )
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias)
        replace_module(net, norm_name, nn.Identity())


def conv_and_norm(net: nn.Module, conv_name: str, norm_name: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The modules of a pair.

    Raises:
        ValueError: they are no convolution and unfolded batch-norm with affine parameters and running statistics.
    """
    conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
    foldable = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
    if not isinstance(conv, nn.Conv2d) or not foldable or isinstance(norm, FoldedBatchNorm2d):
        raise ValueError(
            f"quantizer.fold_bn: {conv_name} and {norm_name} are {type(conv).__name__} and {type(norm).__name__}, no "
            "convolution and a batch-norm with affine parameters and running statistics; use none"
        )
    assert isinstance(norm, nn.BatchNorm2d)
    return conv, norm


def running_norms(net: nn.Module) -> list[_BatchNorm]:
    """The batch-norms of ``net`` whose running statistics may move: all but frozen ones and those that keep none."""
    return [
        module
        for module in net.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and not (isinstance(module, FoldedBatchNorm2d) and module.frozen)
    ]


@torch.no_grad()
def reestimate_batchnorm(net: nn.Module, batches: Iterable[Tensor], momentum: float | None = None) -> int:
    """Estimate the running statistics anew with every quantizer on; nothing else of ``net`` moves.

    Mean and variance become the plain average over the batches (which should be of one size); with ``momentum`` they
    move from where they are by the usual exponential average. Batch counters, training flags and all other state are
    as before. A folded norm's variance changes the weight that is quantized. Under DDP give every rank the same
    batches.

    Args:
        net: a network, converted or not.
        batches: network inputs on the device of ``net``.
        momentum: weight of a batch, or None for the average.

    Returns:
        How many batch-norms were re-estimated: 0 in a network without, of switchable ones those selected.

    Raises:
        ValueError: no batches.
    """
    norms = running_norms(net)
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    seen = 0
    with evaluating(net), passes(net, mode="quantize"):
        try:
            for norm in norms:
                norm.training, norm.momentum = True, momentum
                norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # type: ignore[arg-type]
            for batch in batches:
                net(batch)
                seen += 1
            moved = sum(bool(norm.num_batches_tracked) for norm in norms)
        finally:
            for norm, usual, counter in before:
                norm.momentum, norm.num_batches_tracked = usual, counter
    if not seen:
        raise ValueError("batch-norm re-estimation: no batches; give at least one")
    return moved
