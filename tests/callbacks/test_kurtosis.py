"""KURE: golden vectors, the cheap checks of its formula, and its limits as a mechanic."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.kurtosis import UNIFORM, Kurtosis, kurtosis, kurtosis_loss
from tests.learning.tiny import FLOAT, fit, make_module, state, tiny_net

TARGET = "callbacks.kurtosis.Kurtosis"
SLUG = "kurtosis"
DOUBLE = torch.float64


def data() -> Tensor:
    return torch.randn(7, 30, dtype=DOUBLE).exp().requires_grad_()


def test_golden(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    case = {name: torch.from_numpy(value) for name, value in golden("fed_quant").items()}
    weights = [case[name].requires_grad_() for name in ("w0", "w1")]
    torch.testing.assert_close(torch.stack([kurtosis(w) for w in weights]), case["kurtosis"], rtol=1e-8, atol=0)
    loss = kurtosis_loss(weights, UNIFORM)
    torch.testing.assert_close(loss, case["kure_loss"], rtol=1e-8, atol=0)
    for found, name in zip(torch.autograd.grad(loss, weights), ("kure_grad0", "kure_grad1"), strict=True):
        torch.testing.assert_close(found, case[name], rtol=1e-8, atol=1e-12)


def test_uniform_and_gaussian_data() -> None:  # check 1
    grid = torch.linspace(-1, 1, 100_001, dtype=DOUBLE)
    assert float(kurtosis(grid)) == pytest.approx(1.8, abs=1e-3)
    assert float(kurtosis(torch.erfinv(grid[1:-1]))) == pytest.approx(3.0, abs=1e-2)
    assert float(kurtosis_loss([grid, grid], float(kurtosis(grid)))) == 0.0
    assert float(kurtosis_loss([grid], 3.0)) > 0


def two_sizes(weight: Tensor, small: float) -> Tensor:
    """Equally many of 1, -1, ``small`` and ``-small`` in the shape of ``weight``."""
    values = torch.tensor([1.0, -1.0, small, -small], dtype=weight.dtype)
    return values.repeat(weight.numel() // 4).view_as(weight)


@pytest.mark.parametrize("factor", [1.0, 0.9, 1.1])
def test_the_loss_is_zero_at_the_kurtosis_of_uniform_data_and_nowhere_else(factor: float) -> None:  # check 1
    small = factor * (5**0.5 - 2)  # the root of 2 (1 + b^4) / (1 + b^2)^2 = 1.8
    module = make_module({SLUG: {"_target_": TARGET}}, quantizer=FLOAT)
    weights = [module.net.conv1.weight, module.net.fc.weight]
    for weight in weights:
        weight.data = two_sizes(weight, small)
    term = float(module.objective((torch.randn(4, 3, 8, 8), torch.arange(4))).terms[SLUG].detach())
    loss = float(kurtosis_loss([two_sizes(weight.double(), small) for weight in weights], module.active[0].target))
    assert term == pytest.approx(loss, rel=1e-3, abs=1e-12)
    assert (loss < 1e-28) == (factor == 1.0)


def test_scale_and_shift_do_not_matter_and_the_gradient_is_right() -> None:  # check 1
    w = data()
    torch.testing.assert_close(kurtosis(-3 * w + 5), kurtosis(w))
    assert torch.autograd.gradcheck(lambda x: kurtosis_loss([x], UNIFORM), (w,))


def test_the_gradient_moves_neither_mean_nor_size() -> None:  # check 2
    w = data()
    (gradient,) = torch.autograd.grad(kurtosis(w), w)
    centred = (w - w.mean()).detach()
    size = float(gradient.norm() * centred.norm())
    assert abs(float(gradient.sum())) < 1e-12 * size
    assert abs(float((gradient * centred).sum())) < 1e-10 * size


def test_weights_that_are_all_alike_have_a_finite_gradient() -> None:
    w = torch.zeros(3, 4, requires_grad=True)
    kurtosis(w).backward()
    assert w.grad is not None and bool(w.grad.isfinite().all())


def test_the_loss_has_the_term_at_the_weights_of_the_evaluation() -> None:
    module = make_module({SLUG: {"_target_": TARGET, "strength": 0.5}}, quantizer=FLOAT)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    net = module.net.eval()
    weights = [net.conv1.weight, net.fc.weight]
    found = module.objective(batch)
    torch.testing.assert_close(found.terms[SLUG], 0.5 * kurtosis_loss(weights, UNIFORM))
    torch.testing.assert_close(found.loss, found.terms["task"] + found.terms[SLUG])
    moved = module.objective(batch, {"fc.weight": weights[1].exp()})
    torch.testing.assert_close(moved.terms[SLUG], 0.5 * kurtosis_loss([weights[0], weights[1].exp()], UNIFORM))


def test_training_brings_the_kurtosis_to_its_target() -> None:
    distances = []
    for strength in (0.0, 3.0):
        module = make_module({SLUG: {"_target_": TARGET, "strength": strength}}, quantizer=FLOAT)
        torch.nn.init.normal_(module.net.fc.weight)
        fit(module, max_epochs=4, limit_val_batches=0)
        distances.append(abs(float(kurtosis(module.net.fc.weight)) - UNIFORM))
    assert distances[1] < 0.5 * distances[0]


def test_strength_zero_is_plain_training_bit_for_bit() -> None:  # check 6
    trained = []
    for mechanics in ({}, {SLUG: {"_target_": TARGET, "strength": 0.0}}):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


@pytest.mark.parametrize(("name", "value"), [("strength", -1), ("target", 0.5)])
def test_bad_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"callbacks.kurtosis.{name}={value}"):
        Kurtosis(**{name: value})
