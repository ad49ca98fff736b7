"""A convolution whose second and higher derivatives run on the kernels of its first ones.

``y = x * w`` is bilinear, and with the gradient ``g`` at ``y`` there are three such maps::

    Y(x, w) = y        X(g, w) = gradient at x        W(g, x) = gradient at w

Each one's derivatives are the two others: ``<h, X(g, w)> = <g, Y(h, w)> = <w, W(g, h)>``. The library writes the second
derivative as convolutions with swapped axes instead, which its kernels are several times slower at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from research.quant.fused import Convolution, convolution_dtype


def convolution(x: Tensor, weight: Tensor, geometry: Convolution) -> Tensor:
    """The convolution of x (N, C, H, W) and weight (C', C / groups, k, k), differentiable any number of times."""
    y: Tensor = _Map.apply(0, geometry, None, x, weight)  # type: ignore[no-untyped-call]
    return y


def convolution_forward(layer: nn.Conv2d) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer's ``_conv_forward`` with `convolution`; under autocast in its dtype, as the library's."""
    assert not isinstance(layer.padding, str)
    geometry = Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = convolution_dtype(x)
        y = convolution(x.to(dtype), weight.to(dtype), geometry)
        return y if bias is None else y + bias.to(dtype).view(-1, 1, 1)

    return forward


class _Map(Function):
    """Of the form ``<g, x * w>`` the derivative by the one of ``(g, x, w)`` at place ``by``, at the two others.

    What stands at ``by`` itself only says the shape of the result; for ``by = 0`` it may be None.
    """

    @staticmethod
    def forward(ctx: Any, by: int, geometry: Convolution, *operands: Any) -> Tensor:
        ctx.save_for_backward(*(None if place == by else operand for place, operand in enumerate(operands)))
        ctx.by, ctx.geometry = by, geometry
        g, x, weight = operands
        if by == 0:
            return geometry(x, weight, None)
        found = geometry.backward(g, x, weight, None, (by == 1, by == 2, False))[by - 1]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        operands = list(ctx.saved_tensors)
        operands[ctx.by] = h
        gradients = [
            _Map.apply(place, ctx.geometry, *operands) if needed and place != ctx.by else None  # type: ignore[no-untyped-call]
            for place, needed in enumerate(ctx.needs_input_grad[2:])
        ]
        return None, None, *gradients
