"""The convolution with fast second derivatives: the library's values, the library's derivatives of every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.quant.convolution import convolution
from research.quant.double_backward import fast_double_backward
from research.quant.fused import Convolution

CASES = [
    Convolution((1, 1), (1, 1), (1, 1), 1),
    Convolution((2, 2), (1, 1), (1, 1), 1),
    Convolution((2, 1), (0, 2), (1, 2), 1),
    Convolution((1, 1), (1, 1), (1, 1), 2),
]


def operands(geometry: Convolution, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 7, generator=generator, dtype=dtype)
    weight = torch.randn(6, 4 // geometry.groups, 3, 3, generator=generator, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("geometry", CASES, ids=str)
def test_derivatives_of_three_orders_are_the_librarys(geometry: Convolution) -> None:
    def derivatives(function: Any) -> list[Tensor]:
        x, weight = operands(geometry)
        value = function(x, weight).tanh().square().sum()
        found = []
        for _ in range(3):
            gradients = torch.autograd.grad(value, (x, weight), create_graph=True)
            found += list(gradients)
            value = sum((g * torch.sin(torch.arange(g.numel()).view_as(g))).sum() for g in gradients)
        return found

    ours = derivatives(lambda x, w: convolution(x, w, geometry))
    library = derivatives(lambda x, w: geometry(x, w, None))
    for found, expected in zip(ours, library, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("geometry", CASES, ids=str)
def test_finite_differences_agree(geometry: Convolution) -> None:
    x, weight = operands(geometry)
    small = x[:1, :, :3, :3].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: convolution(a, b, geometry), (small, weight))


def test_only_what_is_asked_for_is_computed() -> None:
    geometry = CASES[0]
    x, weight = operands(geometry)
    (found,) = torch.autograd.grad(convolution(x.detach(), weight, geometry).sum(), weight)
    (expected,) = torch.autograd.grad(geometry(x.detach(), weight, None).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_a_network_takes_it_inside_the_block_only() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), nn.Conv2d(4, 2, 1)
    )
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = net(x)
    with fast_double_backward(net):
        found = net(x)
        assert ["_conv_forward" in layer.__dict__ for layer in net] == [True, False, True]
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    assert not any("_conv_forward" in layer.__dict__ for layer in net)
