"""Bin regularization: golden vectors of SDQ, the cheap checks of its formula, and its limits as a mechanic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.bin_regularization import BinRegularization, per_bin_error, quantizer_bins
from research.learning.module import QuantModule
from research.quant.quantizers import Quantizer, QuantizerSpec, build_quantizer
from tests.learning.tiny import LSQ, fit, make_module, state, tiny_net

TARGET = "callbacks.bin_regularization.BinRegularization"
SLUG = "bin_regularization"
ENTROPY = {"weight": {"name": "n2uq", "bits": 2, "options": {"grad_mode": "plain"}}}
DOUBLE = torch.float64


def make(name: str, bits: int, w: Tensor, granularity: str = "tensor") -> Quantizer:
    quantizer = build_quantizer(QuantizerSpec(name, bits, granularity=granularity), w.shape, 0, "weight").double()
    quantizer.initialise(w.detach())
    return quantizer


def host(quantizer: dict[str, Any], **settings: Any) -> QuantModule:
    return make_module({SLUG: {"_target_": TARGET, **settings}}, quantizer=quantizer)


def test_golden(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    case = {name: torch.from_numpy(value) for name, value in golden("sdq").items() if name.startswith("ebr_")}
    w, bits = case["ebr_w"].requires_grad_(), int(case["ebr_bits"])
    quantizer = make("n2uq", bits, w)
    errors, bins, count = quantizer_bins(quantizer, w)
    normalised = w / w.detach().abs().mean() * 2 ** (bits - 1) / (2**bits - 1)
    levels = case["ebr_levels"]
    torch.testing.assert_close(normalised, case["ebr_wnorm"], rtol=1e-8, atol=0)
    torch.testing.assert_close(errors, normalised - levels[bins], rtol=1e-8, atol=1e-12)
    assert torch.equal(bins, case["ebr_index"].long()) and count == len(levels)
    assert torch.equal(torch.bincount(bins.flatten(), minlength=count), case["ebr_count"].long())
    per_bin = per_bin_error(errors, bins, count)
    torch.testing.assert_close(per_bin, case["ebr_per_bin"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(per_bin.sum(), case["ebr_total"], rtol=1e-8, atol=0)
    (gradient,) = torch.autograd.grad(per_bin.sum(), errors)
    torch.testing.assert_close(gradient, case["ebr_grad_wnorm"], rtol=1e-8, atol=1e-12)


def test_weights_at_the_levels_cost_nothing() -> None:  # check 5
    w = torch.randn(6, 50, dtype=DOUBLE)
    quantizer = make("lsq", 3, w)
    errors, bins, count = quantizer_bins(quantizer, quantizer(w).detach())
    assert float(per_bin_error(errors, bins, count).sum()) < 1e-28
    assert float(per_bin_error(*quantizer_bins(quantizer, w)).sum()) > 1e-3


@pytest.mark.parametrize("name", ["n2uq", "lsq", "minmax"])
def test_weights_at_the_levels_have_no_gradient(name: str) -> None:  # check 5
    quantizer = make(name, 2, torch.randn(6, 50, dtype=DOUBLE))
    qmin, qmax = (int(limit) for limit in quantizer.limits())
    codes = torch.arange(qmin, qmax + 1, 2 if quantizer.grid.kind == "midrise" else 1).repeat(5, 1)
    levels = quantizer.dequantize(codes).detach()
    for shift in (0.0, 0.01):
        w = (levels + shift * quantizer.scale.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(per_bin_error(*quantizer_bins(quantizer, w)).sum(), w)
        assert bool((gradient.abs() < 1e-14).all()) == (shift == 0)


@pytest.mark.parametrize("name", ["n2uq", "lsq", "minmax"])
def test_it_is_mean_offset_and_variance_of_every_bin(name: str) -> None:  # check 5
    w = torch.randn(5, 40, dtype=DOUBLE, requires_grad=True)
    errors, bins, count = quantizer_bins(make(name, 2, w), w)
    found = per_bin_error(errors, bins, count)
    for level in range(count):
        own = errors[bins == level]
        expected = own.mean().square() + own.var(correction=0) if len(own) else torch.zeros((), dtype=DOUBLE)
        torch.testing.assert_close(found[level], expected)
    sizes = torch.bincount(bins.flatten(), minlength=count)
    (gradient,) = torch.autograd.grad(found.sum(), errors)
    torch.testing.assert_close(gradient, 2 * errors / sizes[bins])


def test_order_and_number_of_the_weights_do_not_matter() -> None:  # check 5
    errors, bins = torch.randn(60, dtype=DOUBLE), torch.randint(0, 4, (60,))
    expected = per_bin_error(errors, bins, 4)
    order = torch.randperm(60)
    torch.testing.assert_close(per_bin_error(errors[order], bins[order], 4), expected)
    torch.testing.assert_close(per_bin_error(errors.repeat(3), bins.repeat(3), 4), expected)
    assert float(per_bin_error(errors, torch.zeros_like(bins), 4)[1:].sum()) == 0, "empty bins"


def test_the_normalised_weights_have_the_magnitude_of_even_occupation() -> None:  # check 6
    for bits in (1, 2, 3, 4):
        w = torch.randn(8, 30, dtype=DOUBLE)
        quantizer = make("n2uq", bits, w)
        reach = quantizer.scale * quantizer.limits()[1]
        assert float((w / reach).abs().mean()) == pytest.approx(2 ** (bits - 1) / (2**bits - 1), rel=1e-6)


def test_clipped_weights_are_pulled_in() -> None:
    w = torch.tensor([[0.1, -0.1, 0.1, -0.1, 5.0]], dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(per_bin_error(*quantizer_bins(make("n2uq", 2, w), w)).sum(), w)
    assert float(gradient[0, 4]) > 0


def test_the_loss_has_the_term_at_the_weights_of_the_evaluation() -> None:
    module = host(ENTROPY, strength=0.5)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    net = module.net.eval()

    def expected(*pairs: tuple[Any, Tensor]) -> Tensor:
        return sum(0.5 * per_bin_error(*quantizer_bins(layer.weight_quantizer, w)).sum() for layer, w in pairs)

    found = module.objective(batch)
    torch.testing.assert_close(found.terms[SLUG], expected((net.conv1, net.conv1.weight), (net.fc, net.fc.weight)))
    torch.testing.assert_close(found.loss, found.terms["task"] + found.terms[SLUG])
    other = net.fc.weight.detach().sin() + 0.1
    moved = module.objective(batch, {"fc.weight": other})
    torch.testing.assert_close(moved.terms[SLUG], expected((net.conv1, net.conv1.weight), (net.fc, other)))


@pytest.mark.parametrize("quantizer", [ENTROPY, {"weight": {"name": "lsq", "bits": 2}}], ids=["n2uq", "lsq"])
def test_training_brings_the_weights_to_their_levels(quantizer: dict[str, Any]) -> None:
    errors = []
    for strength in (0.0, 1.0):
        module = host(quantizer, strength=strength)
        fit(module, max_epochs=4, limit_val_batches=0)
        errors.append(float(module.active[0].penalty().detach()))
    assert errors[1] < 0.7 * errors[0]


def test_strength_zero_is_plain_training_bit_for_bit() -> None:
    trained = []
    for mechanics in ({}, {SLUG: {"_target_": TARGET, "strength": 0.0}}):
        module = make_module(mechanics, quantizer=ENTROPY, model=tiny_net(dropout=0.25))
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_it_follows_a_quantizer_that_another_mechanic_put_in_place() -> None:
    module = host(LSQ)
    module.net.fc.weight_quantizer = make("lsq", 2, module.net.fc.weight).float()
    before = module.active[0].penalty()
    module.net.fc.weight_quantizer.raw_scale.data *= 3
    assert not torch.equal(module.active[0].penalty(), before)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({}, "no quantized weight"),
        ({"weight": {"name": "dorefa", "bits": 4}}, r"levels of conv1 \(DoReFa\)"),
        ({**LSQ, "fold_bn": 4}, "fold_bn=none"),
        ({**LSQ, "widths": [2, 4]}, r"widths=\[\]"),
    ],
)
def test_weights_without_such_levels_are_refused(quantizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^callbacks.bin_regularization: [^\n]*{message}"):
        host(quantizer)


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="callbacks.bin_regularization.strength=-1"):
        BinRegularization(strength=-1)
