"""What a second derivative need not look at: parameters that are not variables, and the statistics of batch-norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from research.quant.batchnorm import fold_batchnorm
from research.quant.passes import rebound

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)


@contextmanager
def constants(net: nn.Module) -> Iterator[None]:
    """Inside the block, for a network in evaluation mode, only what is put in place of its parameters is a variable.

    Its own parameters require no gradient, and its batch-norms are the affine maps that they are in evaluation mode:
    the library's batch-norm differentiates by its statistics whether they move or not, which costs a Hessian-vector
    product a third of its time. Same function, same derivatives; float32 results differ by rounding.
    """
    with ExitStack() as stack:
        for parameter in net.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in net.modules():
            if type(module) in NORMS and module.affine and module.track_running_stats:
                stack.enter_context(rebound(module, "forward", affine_forward(module)))
        yield


def affine_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass of a batch-norm with running statistics: ``x (N, C, ...) -> a x + b`` with a, b (C,)."""

    def forward(x: Tensor) -> Tensor:
        statistics = norm.running_mean, norm.running_var, norm.eps
        factor, shift = fold_batchnorm(torch.ones_like(norm.weight), None, norm.weight, norm.bias, *statistics)
        shape = (1, -1, *[1] * (x.dim() - 2))
        y: Tensor = x * factor.view(shape) + shift.view(shape)
        return y

    return forward
