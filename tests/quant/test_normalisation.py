"""The batch-norm with fast second derivatives: the library's values, statistics and derivatives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.quant.double_backward import fast_double_backward


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3, momentum=0.3)).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def derivatives(net: nn.Module, x: Tensor) -> list[Tensor]:
    variables = (x, *net.parameters())
    loss = net(x).pow(3).mean()
    first = torch.autograd.grad(loss, variables, create_graph=True)
    penalty = sum(
        (g * torch.sin(torch.arange(g.numel(), dtype=g.dtype)).view_as(g)).sum() + g.pow(2).sum() for g in first
    )
    second = torch.autograd.grad(penalty, variables)  # type: ignore[arg-type]
    return [loss.detach(), *(g.detach() for g in first), *second]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_values_statistics_and_derivatives_are_the_librarys(layout: Any, dtype: torch.dtype, tolerance: float) -> None:
    ours, library = network(dtype), network(dtype)
    x = torch.randn(4, 3, 5, 6, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    expected = derivatives(library, x)
    with fast_double_backward(ours):
        found = derivatives(ours, x)
    for value, reference in zip(found, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(value / scale, reference / scale, rtol=0, atol=tolerance)
    for name, buffer in library.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


def test_third_derivatives_agree_with_finite_differences() -> None:  # those of the library (torch 2.13) do not
    norm = network(torch.float64)[0]
    generator = torch.Generator().manual_seed(1)
    x, g, a = (torch.randn(4, 3, 2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))

    def second(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        with fast_double_backward(norm):
            first = torch.autograd.grad(norm(x), (x, norm.weight), g, create_graph=True)
        return torch.autograd.grad((first[0] * a).sum() + first[1].pow(2).sum(), (x, g), create_graph=True)

    torch.autograd.gradcheck(second, (x, g))


def test_evaluation_mode_and_the_end_of_the_block_are_the_librarys() -> None:
    net = network(torch.float64)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    before = deepcopy(net.state_dict())
    expected = net.eval()(x)
    with fast_double_backward(net):
        assert torch.equal(net(x), expected)
    assert all("forward" not in vars(module) for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
