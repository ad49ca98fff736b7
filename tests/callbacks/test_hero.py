"""HERO's formulas: golden vectors of the official code and the checks of its specification, by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from callbacks.hero import curvature_penalty, hero_perturbation
from research.learning.module import QuantModule
from research.learning.perturbation import joint_norm
from research.learning.tasks import Classification
from research.models.structure import FloatModel, Structure
from tests.learning.tiny import CLASSES, LSQ, fit, make_module, state, tiny_net

Golden = Callable[[str], dict[str, np.ndarray]]


class Float64(Classification):
    """Classification that keeps float64 logits."""

    def evaluate(self, net: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = net(batch[0])
        return logits, self.criterion(logits, batch[1])


class GoldenNet(FloatModel):
    """conv - bn - tanh, twice, then global average pool and fc: the network of the golden vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, CLASSES)

    def structure(self) -> Structure:
        return Structure(blocks=(), conv_bn=(("conv1", "bn1"), ("conv2", "bn2")), first="conv1", last="fc")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def host(
    model: dict[str, Any], slug: str = "hero", target: str = "callbacks.hero.HERO", **settings: Any
) -> QuantModule:
    module = make_module(
        {slug: {"_target_": target, **settings}},
        quantizer={},
        model=model,
        task={"_target_": "tests.callbacks.test_hero.Float64", "num_classes": CLASSES},
    )
    return module.double()


def golden_host(vectors: dict[str, np.ndarray], **settings: Any) -> QuantModule:
    radius, strength = (float(value) for value in vectors["hparams_rho_lambda_lr_momentum_wd"][:2])
    given = {"radius": radius, "strength": strength, "warmup_epochs": 0, "statistics": "all", **settings}
    module = host({"_target_": "tests.callbacks.test_hero.GoldenNet"}, **given)
    with torch.no_grad():
        for name, parameter in module.net.named_parameters():
            parameter.copy_(torch.from_numpy(vectors[f"p0.{name}"]))
    return module


def same(found: Tensor, expected: np.ndarray, what: str, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found.detach(), torch.from_numpy(expected), rtol=rtol, atol=1e-13, msg=what)


@pytest.mark.parametrize("tensors", ["modules", "names"])
def test_two_steps_are_those_of_the_official_code(golden: Golden, tensors: str) -> None:
    vectors = golden("hero")
    module = golden_host(vectors, tensors=tensors)
    lr, momentum, decay = (float(value) for value in vectors["hparams_rho_lambda_lr_momentum_wd"][2:])
    optimizer = torch.optim.SGD(module.net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    batch = torch.from_numpy(vectors["x"]), torch.from_numpy(vectors["y"])
    for step in ("s0", "s1"):
        optimizer.zero_grad()
        evaluation = module.objective(batch)
        same(evaluation.terms["task"], vectors[f"{step}.loss_clean"], "clean loss")
        same(evaluation.terms["hero"], vectors[f"{step}.hero_loss"], "penalty")
        same(evaluation.loss - evaluation.terms["hero"], vectors[f"{step}.loss_pert"], "perturbed loss")
        g_pert = {n: torch.from_numpy(vectors[f"{step}.g_pert.{n}"]) for n, _ in module.net.named_parameters()}
        moves = {n: g - torch.from_numpy(vectors[f"{step}.g_clean.{n}"]) for n, g in g_pert.items()}
        torch.testing.assert_close(evaluation.terms["hero_gradient"], joint_norm(g_pert), rtol=1e-8, atol=0)
        torch.testing.assert_close(evaluation.terms["hero_move"], joint_norm(moves), rtol=1e-8, atol=0)
        evaluation.loss.backward()
        for name, parameter in module.net.named_parameters():
            assert parameter.grad is not None
            same(parameter.grad, vectors[f"{step}.grad_total.{name}"], f"{step} G {name}")
        optimizer.step()
        for name, parameter in module.net.named_parameters():
            same(parameter, vectors[f"{step}.p_after.{name}"], f"{step} {name}")
    for name, buffer in module.net.named_buffers():
        same(buffer, vectors[f"buf_after.{name}"], name)


def test_the_perturbation_is_that_of_the_official_code(golden: Golden) -> None:
    vectors = golden("hero")
    names = [key.removeprefix("p0.") for key in vectors if key.startswith("p0.")]
    weights = {name: torch.from_numpy(vectors[f"p0.{name}"]) for name in names}
    gradients = {name: torch.from_numpy(vectors[f"s0.g_clean.{name}"]) for name in names}
    radius = float(vectors["hparams_rho_lambda_lr_momentum_wd"][0])
    for name, e in hero_perturbation(gradients, weights, radius).items():
        same(weights[name] + e, vectors[f"s0.p_pert.{name}"], name, rtol=1e-12)


def test_every_tensor_of_two_steps_is_that_of_the_official_code(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = golden("hero")
    module = golden_host(vectors)
    parameters = dict(module.net.named_parameters())
    lr, momentum, decay = (float(value) for value in vectors["hparams_rho_lambda_lr_momentum_wd"][2:])
    optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=momentum, weight_decay=decay)
    found: dict[str, dict[str, Tensor]] = {}

    def recorded(clean: dict[str, Tensor], *arguments: Any) -> dict[str, Tensor]:
        moves = hero_perturbation(clean, *arguments)
        found["g_clean"] = clean
        found["p_pert"] = {name: parameters[name].detach() + move for name, move in moves.items()}
        return moves

    monkeypatch.setattr("callbacks.hero.hero_perturbation", recorded)
    for step in ("s0", "s1"):
        optimizer.zero_grad()
        evaluation = module.objective((torch.from_numpy(vectors["x"]), torch.from_numpy(vectors["y"])))
        penalty = evaluation.terms["hero"]
        found["g_pert"] = gradients(evaluation.loss - penalty, parameters, create_graph=True)
        found["grad_hero"] = gradients(penalty, parameters, create_graph=True)
        for field, tensors in found.items():
            for name in parameters:
                same(tensors[name], vectors[f"{step}.{field}.{name}"], f"{step} {field} {name}")
        evaluation.loss.backward()
        optimizer.step()


def test_1_a_quadratic_by_hand() -> None:
    curvature = torch.tensor([3.0, 1.0], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    clean = curvature * w
    (e,) = hero_perturbation({"w": clean}, {"w": w}, radius=0.5).values()
    torch.testing.assert_close(e, torch.tensor([0.3, 0.8], dtype=torch.float64), rtol=1e-12, atol=0)
    moved = (w + e).requires_grad_()
    (perturbed,) = torch.autograd.grad((curvature * moved.square()).sum() / 2, moved, create_graph=True)
    torch.testing.assert_close(perturbed, torch.tensor([3.9, 2.8], dtype=torch.float64), rtol=1e-12, atol=0)
    penalty = 5 * curvature_penalty([perturbed], [clean])
    assert penalty.item() == pytest.approx(3.625, rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, moved)
    torch.testing.assert_close(slope, torch.tensor([13.5, 4.0], dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(perturbed + slope, torch.tensor([17.4, 6.8], dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("strength", [0.0, 5.0])
@pytest.mark.parametrize("quantizer", [{}, LSQ], ids=["float", "lsq"])
def test_2_radius_zero_is_plain_training_bit_for_bit(quantizer: dict[str, Any], strength: float) -> None:
    plain = make_module(quantizer=quantizer, model=tiny_net(dropout=0.25))
    fit(plain, max_epochs=2)
    hero = {"hero": {"_target_": "callbacks.hero.HERO", "radius": 0.0, "strength": strength}}
    robust = make_module(hero, quantizer=quantizer, model=tiny_net(dropout=0.25))
    fit(robust, max_epochs=2)
    expected = state(plain.net)
    assert [name for name, value in state(robust.net).items() if not torch.equal(value, expected[name])] == []


class Weights(FloatModel):
    """Two convolutions without biases, the second a classifier: nothing but weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, bias=False), nn.Conv2d(5, CLASSES, 3, bias=False)

    def structure(self) -> Structure:
        return Structure(blocks=(), conv_bn=(), first="conv1", last="conv2")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(torch.tanh(self.conv1(x))).mean((2, 3))
        return y


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % CLASSES


@pytest.mark.parametrize("adaptive", [True, False], ids=["asam", "sam"])
@pytest.mark.parametrize("settings", [{"strength": 0.0, "warmup_epochs": 0}, {"warmup_epochs": 1}], ids=["0", "warmup"])
def test_2_without_the_penalty_it_is_asam_or_sam(settings: dict[str, Any], adaptive: bool) -> None:
    model = {"_target_": "tests.callbacks.test_hero.Weights"}
    hero = host(model, radius=0.3, adaptive=adaptive, **settings)
    sam = host(model, "sam", "callbacks.sam.SAM", rho=0.3, adaptive=adaptive, eta=0.0)
    found, expected = hero.objective(images()), sam.objective(images())
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert found.terms["hero"].item() == 0 and not found.terms["hero"].requires_grad
    found.loss.backward()
    expected.loss.backward()
    for one, other in zip(hero.net.parameters(), sam.net.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


def smooth_net() -> tuple[nn.Module, dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """A small tanh network in float64, its parameters, and its loss as a function of them."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    return net, parameters, lambda p: nn.functional.cross_entropy(functional_call(net, p, (x,)), y)


def gradients(loss: Tensor, parameters: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("form", ["mean_square", "norm"])
def test_3_the_slope_of_the_penalty_against_finite_differences(form: str) -> None:
    _, parameters, loss = smooth_net()
    clean = gradients(loss(parameters), parameters)
    e = hero_perturbation(clean, parameters, 0.5)
    moved = {name: (p + e[name]).detach().requires_grad_() for name, p in parameters.items()}

    def penalty(at: dict[str, Tensor]) -> Tensor:
        perturbed = gradients(loss(at), at, create_graph=True)
        weights = [name for name in at if name.endswith("weight")]
        return 5 * curvature_penalty([perturbed[n] for n in weights], [clean[n] for n in weights], form)

    slope = gradients(penalty(moved), moved)
    step = 1e-5
    for name, tensor in moved.items():
        numeric = torch.empty_like(tensor)
        for index in range(tensor.numel()):
            shift = torch.zeros(tensor.numel(), dtype=torch.float64)
            shift[index] = step
            up, down = (
                penalty({**moved, name: (tensor + sign * shift.view_as(tensor)).detach().requires_grad_()})
                for sign in (1, -1)
            )
            numeric.view(-1)[index] = (up - down).detach() / (2 * step)
        assert float((numeric - slope[name]).norm() / slope[name].norm()) < 1e-6, name


def test_4_the_clean_gradient_is_a_constant() -> None:
    _, parameters, loss = smooth_net()
    clean = gradients(loss(parameters), parameters, create_graph=True)
    e = {n: move.detach() for n, move in hero_perturbation(clean, parameters, 0.5).items()}
    moved = {name: p + e[name] for name, p in parameters.items()}
    perturbed = gradients(loss(moved), parameters, create_graph=True)
    found = gradients(curvature_penalty(perturbed.values(), clean.values()), parameters, create_graph=True)
    moves = [perturbed[n] - clean[n].detach() for n in perturbed]
    constant = gradients(torch.stack([move.square().mean() for move in moves]).sum(), parameters, create_graph=True)
    moves = [perturbed[n] - clean[n] for n in perturbed]
    leaking = gradients(torch.stack([move.square().mean() for move in moves]).sum(), parameters)
    for name in parameters:
        torch.testing.assert_close(found[name], constant[name], rtol=1e-12, atol=0)
        assert not torch.allclose(found[name], leaking[name], rtol=1e-2)


@pytest.mark.parametrize("shape", [(1,), (3, 4), (2, 3, 5, 5)])
def test_5_the_mean_over_elements_not_the_sum(shape: tuple[int, ...]) -> None:
    clean = torch.randn(shape, dtype=torch.float64)
    assert curvature_penalty([clean + 0.5], [clean]).item() == pytest.approx(0.25, rel=1e-12)
    root = clean.numel() ** 0.5
    assert curvature_penalty([clean + 0.5], [clean], "norm").item() == pytest.approx(0.5 * root, rel=1e-12)
    assert curvature_penalty([clean + 0.5] * 2, [clean] * 2).item() == pytest.approx(0.5, rel=1e-12), "a sum of tensors"


def test_6_the_step_starts_at_the_parameters_not_at_the_perturbed_ones(golden: Golden) -> None:
    vectors = golden("hero")
    module = golden_host(vectors)
    lr, momentum, decay = (float(value) for value in vectors["hparams_rho_lambda_lr_momentum_wd"][2:])
    optimizer = torch.optim.SGD(module.net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    before = state(module.net)
    module.objective((torch.from_numpy(vectors["x"]), torch.from_numpy(vectors["y"]))).loss.backward()
    for name, parameter in module.net.named_parameters():
        assert torch.equal(parameter, before[name]), "the evaluations leave the parameters where they are"
    optimizer.step()
    for name, parameter in module.net.named_parameters():
        assert parameter.grad is not None
        expected = before[name] - lr * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-15)


def test_7_a_constant_hessian_gives_its_product_with_the_perturbation() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    net = nn.Linear(4, 3).double()
    parameters = dict(net.named_parameters())

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.mse_loss(nn.functional.linear(x, weight, bias), y)

    clean = gradients(loss(**parameters), parameters)
    e = hero_perturbation(clean, parameters, 0.5)
    moved = {name: (p + e[name]).detach().requires_grad_() for name, p in parameters.items()}
    perturbed = gradients(loss(**moved), moved)
    _, product = torch.autograd.functional.hvp(loss, tuple(parameters.values()), tuple(e.values()))
    expected = sum(part.square().mean() for part in product)
    assert curvature_penalty(perturbed.values(), clean.values()).item() == pytest.approx(expected.item(), rel=1e-10)
