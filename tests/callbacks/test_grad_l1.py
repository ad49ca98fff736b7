"""GRAD-L1 against closed forms, finite differences and its own limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.grad_l1 import GradL1, gradient_l1
from research.learning.module import QuantModule
from tests.callbacks.test_hero import host, images
from tests.learning.tiny import LSQ, fit, make_module, state, tiny_net

TARGET = "callbacks.grad_l1.GradL1"
SMOOTH = {"_target_": "tests.callbacks.test_hero.Weights"}


def weights(module: QuantModule) -> list[Tensor]:
    return [layer.weight for layer in module.net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_the_norm_is_a_sum_over_all_elements_of_all_tensors() -> None:
    assert float(gradient_l1([torch.tensor([1.0, -2.0]), torch.tensor([[-3.0]])])) == 6.0


def test_it_is_the_worst_first_order_change_of_a_bounded_perturbation() -> None:
    gradients = [torch.randn(3, 4), torch.randn(5)]
    worst = sum(float((gradient * 0.1 * gradient.sign()).sum()) for gradient in gradients)
    assert 0.1 * float(gradient_l1(gradients)) == pytest.approx(worst, rel=1e-6)


def test_the_loss_has_the_term_and_the_biases_stay_out_of_it() -> None:
    module = host(tiny_net(batchnorm=False), "grad_l1", TARGET, strength=0.5)
    plain = host(tiny_net(batchnorm=False), "grad_l1", TARGET, strength=0.0)
    task = plain.objective(images())
    assert list(task.terms) == ["task"]
    expected = 0.5 * gradient_l1(torch.autograd.grad(task.loss, weights(plain)))
    found = module.objective(images())
    torch.testing.assert_close(found.terms["grad_l1"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.loss, task.loss + expected, rtol=1e-12, atol=0)


def test_layers_that_the_loss_does_not_see_are_left_out() -> None:
    model = {"_target_": "tests.callbacks.saq_host.Unused"}
    module = host(model, "grad_l1", TARGET, strength=0.5)
    seen = [module.net.conv1.weight, module.net.fc.weight]
    task = nn.functional.cross_entropy(module.net(images()[0]), images()[1])
    expected = 0.5 * gradient_l1(torch.autograd.grad(task, seen))
    torch.testing.assert_close(module.objective(images()).terms["grad_l1"], expected, rtol=1e-12, atol=0)
    trained = make_module({"grad_l1": {"_target_": TARGET}}, quantizer={}, model=model)
    start = state(trained.net)
    fit(trained, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    assert not torch.equal(trained.net.conv1.weight, start["conv1.weight"])


def test_its_slope_against_finite_differences() -> None:
    module = host(SMOOTH, "grad_l1", TARGET, strength=0.5)
    parameters = dict(module.net.named_parameters())
    slopes = torch.autograd.grad(module.objective(images()).loss, list(parameters.values()))
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    step = 1e-6

    def loss(distance: float) -> float:
        moved = {name: p + distance * direction[name] for name, p in parameters.items()}
        return float(module.objective(images(), moved).loss.detach())

    expected = sum(float((slope * direction[name]).sum()) for name, slope in zip(parameters, slopes, strict=True))
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("quantizer", [{}, LSQ], ids=["float", "lsq"])
def test_strength_zero_is_plain_training_bit_for_bit(quantizer: dict[str, Any]) -> None:
    trained = []
    for mechanics in ({}, {"grad_l1": {"_target_": TARGET, "strength": 0.0}}):
        module = make_module(mechanics, quantizer=quantizer, model=tiny_net(dropout=0.25))
        fit(module, max_epochs=2)
        trained.append(state(module.net))
    absent, disabled = trained
    assert [name for name, value in disabled.items() if not torch.equal(value, absent[name])] == []


def test_training_with_it_ends_at_smaller_gradients() -> None:
    norms = []
    for strength in (0.0, 0.1):
        module = host(SMOOTH, "grad_l1", TARGET, strength=strength)
        optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            module.objective(images()).loss.backward()
            optimizer.step()
        task = module.objective(images()).terms["task"]
        norms.append(float(gradient_l1(torch.autograd.grad(task, weights(module)))))
    assert norms[1] < 0.8 * norms[0]


@pytest.mark.parametrize("other", ["sam", "hero"])
def test_other_mechanics_evaluate_the_regularised_loss(other: str) -> None:
    target = {"sam": "callbacks.sam.SAM", "hero": "callbacks.hero.HERO"}[other]
    mechanics = {"grad_l1": {"_target_": TARGET, "strength": 0.01}, other: {"_target_": target}}
    module = make_module(mechanics, quantizer=LSQ)
    fit(module, max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    evaluation = module.objective((torch.rand(8, 3, 8, 8), torch.arange(8) % 4))
    slopes = torch.autograd.grad(evaluation.loss, weights(module))
    assert bool(evaluation.terms["grad_l1"] > 0)
    assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="grad_l1.strength=-1: use 0 or more"):
        GradL1(strength=-1)
    ewgs = {"weight": {"name": "ewgs", "bits": 4, "signed": True}}
    with pytest.raises(ValueError, match=r"callbacks\.grad_l1: .* conv1\.weight_quantizer \(EWGS\)"):
        make_module({"grad_l1": {"_target_": TARGET}}, quantizer=ewgs)
    module = make_module(quantizer={})
    module.net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trained weight of a convolution"):
        GradL1().attach(module)
