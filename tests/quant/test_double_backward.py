"""Second derivatives under autocast: the library's values and gradients, and Hessian products no further off."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from research.quant.double_backward import fast_double_backward


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return net


def products(net: nn.Module, x: Tensor, autocast: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The loss with its gradients, and the derivatives of their squared norm."""
    parameters = tuple(net.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = net(x).pow(2).mul(torch.linspace(0, 1, 4, dtype=x.dtype)[:, None, None]).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    penalty = sum((gradient.pow(2).sum() for gradient in gradients), loss.new_zeros(()))
    second = torch.autograd.grad(penalty, parameters)
    return [loss.detach(), *(gradient.detach() for gradient in gradients)], list(second)


def test_under_autocast_values_are_the_librarys_and_products_no_further_from_exact() -> None:
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    ours = network()
    library, exact = deepcopy(ours), deepcopy(ours).double()
    with fast_double_backward(ours):
        first, second = products(ours, x, autocast=True)
    expected_first, expected_second = products(library, x, autocast=True)
    _, reference = products(exact, x.double(), autocast=False)
    assert all(torch.equal(found, expected) for found, expected in zip(first, expected_first, strict=True))

    def error(products: list[Tensor]) -> float:
        return float(sum((a.double() - b).pow(2).sum() for a, b in zip(products, reference, strict=True))) ** 0.5

    assert error(second) <= 1.1 * error(expected_second)
    assert error(second) < 0.05 * error([torch.zeros_like(value) for value in second])
    assert all(value.dtype == torch.float32 for value in second)
    for name, buffer in library.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
