"""What HERO is for, on a toy: check 8 of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.models.structure import FloatModel, Structure
from research.quant.ptq import quantized_copy
from tests.learning.tiny import make_module


class Spirals(FloatModel):
    """Two inputs, two hidden layers of 32 tanh units, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def structure(self) -> Structure:
        return Structure(blocks=(), conv_bn=(), first="fc1", last="fc3")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return y


def spirals(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on three interleaved spirals, with some noise, and the spiral of each."""
    generator = torch.Generator().manual_seed(seed)
    labels, radius = torch.arange(points) % 3, torch.rand(points, generator=generator)
    angle = 4.5 * radius + labels * 2 * math.pi / 3
    noise = 0.05 * torch.randn(points, 2, generator=generator)
    return 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + noise, labels


def top_eigenvalue(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the loss's Hessian, by power iteration."""
    parameters = list(net.parameters())
    slope = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), parameters, create_graph=True)
    generator, value = torch.Generator().manual_seed(0), 0.0
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    for _ in range(40):
        length = torch.stack([part.square().sum() for part in vector]).sum().sqrt()
        vector = [part / length for part in vector]
        product = torch.autograd.grad(slope, parameters, vector, retain_graph=True)
        value = sum(float((one * other).sum()) for one, other in zip(product, vector, strict=True))
        vector = list(product)
    return value


def trained_to(target: float, mechanics: dict[str, Any], seed: int) -> tuple[float, float]:
    """Top Hessian eigenvalue and 3-bit test accuracy of a network trained until its loss is below ``target``."""
    task = {"_target_": "research.learning.tasks.Classification", "num_classes": 3}
    model = {"_target_": "tests.callbacks.test_hero_flatness.Spirals"}
    module = make_module(mechanics, seed, quantizer={}, model=model, task=task)
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.2, momentum=0.9)
    x, y = spirals(300, seed)
    for _ in range(300):
        optimizer.zero_grad()
        evaluation = module.objective((x, y))
        if float(evaluation.terms["task"].detach()) < target:
            break
        evaluation.loss.backward()
        optimizer.step()
    else:
        pytest.fail("the loss stays above its target")
    images, labels = spirals(3000, seed + 100)
    with torch.no_grad():
        accuracy = (quantized_copy(module.net, 3)(images).argmax(1) == labels).float().mean()
    return top_eigenvalue(module.net, x, y), float(accuracy)


def test_8_flatter_than_sgd_at_the_same_loss_and_better_at_three_bits() -> None:
    hero = {"hero": {"_target_": "callbacks.hero.HERO", "radius": 1.0, "strength": 20.0, "warmup_epochs": 0}}
    pairs = [(trained_to(0.1, {}, seed), trained_to(0.1, hero, seed)) for seed in range(5)]
    assert sum(robust[0] < plain[0] for plain, robust in pairs) == 5
    assert sum(robust[1] > plain[1] for plain, robust in pairs) >= 4
