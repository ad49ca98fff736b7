"""Second derivatives through every surrogate quantizer: symmetric, dense = matrix-free, forward- and batched mode."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from research.quant.quantizers import REGISTRY, QuantizerSpec, build_quantizer, quantizer_class
from research.quant.quantizers.base import Quantizer

SYMMETRY = 1e-12
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *((name, "tensor", {}, {"alpha": 2.0} if name == "pact" else {}) for name in REGISTRY),
    ("lsq", "channel", {}, {}),
    ("lsq", "tensor", {"mask": "round_first"}, {"mask": "round_first"}),
    ("minmax", "channel", {"symmetric": False}, {"symmetric": False}),
    ("lsq_plus", "channel", {"configuration": "C4"}, {"offset": "integer"}),
    ("pact", "tensor", {"weight_grid": "uniform"}, {"lower": -3.0, "alpha": 2.0}),
]


class Net(nn.Module):
    """Two linear layers, weights and inputs quantized."""

    def __init__(self, w1: nn.Module, a1: nn.Module, w2: nn.Module, a2: nn.Module) -> None:
        super().__init__()
        self.first = nn.Parameter(0.7 * torch.randn(4, 3))
        self.second = nn.Parameter(0.7 * torch.randn(2, 4))
        self.w1, self.a1, self.w2, self.a2 = w1, a1, w2, a2

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.softplus(self.a1(x) @ self.w1(self.first).T)
        return self.a2(x) @ self.w2(self.second).T


class Problem:
    """The loss of a small network as a function of all parameters, flat."""

    def __init__(self, net: Net, calibrate: bool = True) -> None:
        self.net = net.double()
        self.x, self.target = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
        second = self.x if getattr(net.a2, "max_bits", 8) == 1 else self.x.abs()  # signs need values of both
        for quantizer, data in ((net.w1, net.first), (net.a1, self.x), (net.w2, net.second), (net.a2, second)):
            if calibrate:
                quantizer.initialise(data)
        self.names = [name for name, _ in net.named_parameters()]
        self.shapes = [parameter.shape for parameter in net.parameters()]
        self.flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    def loss(self, flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        values = {n: p.reshape(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}
        return (functional_call(self.net, values, (self.x,)) - self.target).pow(2).exp().mean().log()

    def hessian_vector(self, vector: Tensor) -> Tensor:
        """Double backward, one vector."""
        flat = self.flat.clone().requires_grad_()
        (first,) = torch.autograd.grad(self.loss(flat), flat, create_graph=True)
        (product,) = torch.autograd.grad(first, flat, vector)
        return product

    def matrix(self) -> Tensor:
        return torch.stack([self.hessian_vector(row) for row in torch.eye(len(self.flat), dtype=torch.float64)])


def asymmetry(matrix: Tensor) -> float:
    return ((matrix - matrix.T).abs().max() / matrix.abs().max()).item()


def quantized_net(name: str, granularity: str, weight: dict[str, Any], inputs: dict[str, Any]) -> Net:
    def build(role: str, shape: tuple[int, ...]) -> Quantizer:
        own = granularity if role == "weight" else "tensor"
        bits = min(3, quantizer_class(name).max_bits)
        spec = QuantizerSpec(name, bits, granularity=own, options=weight if role == "weight" else inputs)
        return build_quantizer(spec, shape, 0 if role == "weight" else None, role)

    net = Net(build("weight", (4, 3)), build("input", ()), build("weight", (2, 4)), build("input", ()))
    if quantizer_class(name).backward == "gradient_dependent":
        for quantizer in (net.w1, net.a1, net.w2, net.a2):
            quantizer.delta.fill_(0.3)
            quantizer.plain_ste = True  # what curvature puts in the place of such a rule
    return net.eval()  # in training LQ-Nets moves its levels


@pytest.mark.parametrize(("name", "granularity", "weight", "inputs"), CASES, ids=str)
def test_hessian(name: str, granularity: str, weight: dict[str, Any], inputs: dict[str, Any]) -> None:
    problem = Problem(quantized_net(name, granularity, weight, inputs))
    matrix = problem.matrix()
    scale = matrix.abs().max()
    assert scale > 1e-3
    assert asymmetry(matrix) < SYMMETRY
    dense = torch.autograd.functional.hessian(problem.loss, problem.flat)
    assert (matrix - dense).abs().max() <= SYMMETRY * scale
    identity = torch.eye(len(problem.flat), dtype=torch.float64)
    batched = vmap(lambda v: jvp(grad(problem.loss), (problem.flat,), (v,))[1])(identity)
    assert (batched - dense).abs().max() <= SYMMETRY * scale
    value, slope = jvp(problem.loss, (problem.flat,), (identity[0],))
    torch.testing.assert_close(value, problem.loss(problem.flat))
    torch.testing.assert_close(slope, grad(problem.loss)(problem.flat)[0])


class MonolithicLSQ(torch.autograd.Function):
    """LSQ with the right values and first derivatives, written as one Function with saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.round(torch.clamp(x / scale, -4, 3)) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        u = x / scale
        inside = (u >= -4) & (u <= 3)
        slope = torch.where(inside, torch.round(u) - u, torch.clamp(u, -4, 3))
        return gradient * inside, (gradient * slope).sum()


class Monolithic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return MonolithicLSQ.apply(x, self.raw_scale)


def test_a_monolithic_function_fails_the_symmetry_check() -> None:
    def learned_step() -> Quantizer:
        spec = QuantizerSpec("lsq", 3, signed=True, options={"gradient_factor": False})
        quantizer = build_quantizer(spec, (), None, "input")
        quantizer.raw_scale.data.fill_(0.3)
        return quantizer

    problems = []
    for make in (learned_step, Monolithic):
        torch.manual_seed(1)
        problems.append(Problem(Net(make(), nn.Identity(), make(), nn.Identity()), calibrate=False))
    detached, monolithic = problems
    gradients = []
    for problem in problems:
        flat = problem.flat.clone().requires_grad_()
        gradients.append(torch.autograd.grad(problem.loss(flat), flat)[0])
    torch.testing.assert_close(*gradients)  # nothing to be seen in the first derivatives
    assert asymmetry(detached.matrix()) < SYMMETRY
    assert asymmetry(monolithic.matrix()) > 1e-3
