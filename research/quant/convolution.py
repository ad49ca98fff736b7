"""A convolution whose second and higher derivatives run on the kernels of its first ones.

``y = x * w`` is bilinear, and with the gradient ``g`` at ``y`` there are three such maps::

    Y(x, w) = y        X(g, w) = gradient at x        W(g, x) = gradient at w

Each one's derivatives are the two others: ``<h, X(g, w)> = <g, Y(h, w)> = <w, W(g, h)>``. The library writes the second
derivative as convolutions with swapped axes instead, which its kernels are several times slower at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from research.quant.fused import Convolution
from research.quant.passes import method_replaced


def convolution(x: Tensor, weight: Tensor, geometry: Convolution) -> Tensor:
    """The convolution of x (N, C, H, W) and weight (C', C / groups, k, k), differentiable any number of times."""
    y: Tensor = _Output.apply(x, weight, geometry)  # type: ignore[no-untyped-call]
    return y


@contextmanager
def fast_double_backward(net: nn.Module) -> Iterator[None]:
    """Inside the block the convolutions of ``net`` are `convolution`; same values, derivatives equal up to rounding.

    Those that pad with anything but zeros, and all under autocast, stay what they are.
    """
    with ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                stack.enter_context(method_replaced(module, "_conv_forward", _forward(module)))
        yield


def _forward(layer: nn.Conv2d) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    library = layer._conv_forward
    assert not isinstance(layer.padding, str)
    geometry = Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            y: Tensor = library(x, weight, bias)
            return y
        y = convolution(x, weight, geometry)
        return y if bias is None else y + bias.view(-1, 1, 1)

    return forward


class _Output(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Convolution) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return geometry(x, weight, None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, _ = ctx.needs_input_grad
        return (
            _InputGradient.apply(g, weight, x, ctx.geometry) if by_x else None,  # type: ignore[no-untyped-call]
            _WeightGradient.apply(g, x, weight, ctx.geometry) if by_weight else None,  # type: ignore[no-untyped-call]
            None,
        )


class _InputGradient(Function):
    """X(g, w); ``like`` is any tensor in the shape of the result."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, like: Tensor, geometry: Convolution) -> Tensor | None:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        return geometry.backward(g, like, weight, None, (True, False, False))[0]

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        by_g, by_weight, _, _ = ctx.needs_input_grad
        return (
            _Output.apply(h, weight, ctx.geometry) if by_g else None,  # type: ignore[no-untyped-call]
            _WeightGradient.apply(g, h, weight, ctx.geometry) if by_weight else None,  # type: ignore[no-untyped-call]
            None,
            None,
        )


class _WeightGradient(Function):
    """W(g, x); ``like`` is any tensor in the shape of the result."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, like: Tensor, geometry: Convolution) -> Tensor | None:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return geometry.backward(g, x, like, None, (False, True, False))[1]

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        by_g, by_x, _, _ = ctx.needs_input_grad
        return (
            _Output.apply(x, h, ctx.geometry) if by_g else None,  # type: ignore[no-untyped-call]
            _InputGradient.apply(g, h, x, ctx.geometry) if by_x else None,  # type: ignore[no-untyped-call]
            None,
            None,
        )
