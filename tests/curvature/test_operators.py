"""Curvature operators against dense matrices made by hand: every quantizer, every surface, batches of unequal sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hessian_eigenthings.operators.base import LambdaOperator
from torch import Tensor, nn

from research.curvature.batches import FixedBatches
from research.curvature.operators import CurvatureOperator, asymmetry, fisher, ggn, hessian
from research.curvature.spectrum import top_eigenvalues, trace
from research.curvature.surface import SURFACES, Surface
from research.deploy.deployed import deployed
from research.quant.layers import quant_layers, quantizers
from research.quant.quantizers import REGISTRY, quantizer_class
from research.quant.quantizers.ewgs import EWGS
from tests.curvature.small import (
    CUTS,
    WEIGHTS,
    at_surface,
    crossentropy,
    dense_hessian,
    flat_loss,
    matrix,
    products,
    samples,
    small_batches,
    small_net,
    vectors,
)

CASES = [(name, surface) for name in [*REGISTRY, None] for surface in SURFACES]


@pytest.mark.parametrize(("name", "surface"), CASES, ids=str)
def test_hessian_of_every_quantizer_on_every_surface(name: str | None, surface: Surface) -> None:
    net = small_net(name)
    operator = hessian(net, crossentropy, small_batches(), surface)
    found, dense = matrix(operator), dense_hessian(net, surface)
    scale = float(dense.abs().max())
    assert scale > 1e-4
    assert float((found - found.T).abs().max()) < 1e-12 * scale
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-11 * scale)

    assembled = LambdaOperator(lambda v: found @ v, operator.size, dtype=torch.float64)
    top = top_eigenvalues(assembled, k=3, tolerance=1e-7, progress=False)
    exact = torch.linalg.eigvalsh(dense)
    expected = exact[exact.abs().argsort(descending=True)][:3]
    assert top.converged == (True, True, True)
    assert list(top.values) == pytest.approx(expected.tolist(), rel=1e-6)

    estimate = trace(assembled, probes=30, seed=0, progress=False)
    assert abs(estimate.value - float(dense.trace())) < 3 * estimate.standard_error + 1e-9 * scale

    replaced = [] if name is None else [quantizer for quantizer, _ in quantizers(net)]
    gradient_dependent = name is not None and quantizer_class(name).backward == "gradient_dependent"
    assert operator.replaced == (replaced if gradient_dependent else [])


def test_rules_of_quantizers_inside_another_are_replaced_too() -> None:
    found = []
    for delta in (0.0, 0.7):
        net = small_net("ewgs", widths=(2, 3))
        inner = [module for module in net.modules() if isinstance(module, EWGS)]
        assert len(inner) == 8  # weight and input of two layers at two widths
        for quantizer in inner:
            quantizer.delta.fill_(delta)
        operator = hessian(net, crossentropy, small_batches(), "latent")
        assert len(operator.replaced) == 4
        found.append(matrix(operator))
    assert torch.equal(*found)


def outputs_and_weights(surface: Surface) -> tuple[nn.Module, list[nn.Parameter]]:
    by_hand = at_surface(small_net(), surface)
    return by_hand, [dict(by_hand.named_parameters())[name] for name in WEIGHTS]


@pytest.mark.parametrize("surface", SURFACES)
def test_fisher_is_the_mean_outer_product_of_sample_gradients(surface: Surface) -> None:
    by_hand, weights = outputs_and_weights(surface)
    x, y = samples()
    total = torch.zeros(42, 42, dtype=torch.float64)
    for i in range(len(y)):
        gradients = torch.autograd.grad(crossentropy(by_hand, (x[i : i + 1], y[i : i + 1])), weights)
        g = torch.cat([gradient.flatten() for gradient in gradients])
        total += torch.outer(g, g) / len(y)
    found = products(fisher(small_net(), crossentropy, small_batches(), surface))
    torch.testing.assert_close(found, vectors(42) @ total, rtol=0, atol=1e-11 * float(total.abs().max()))


@pytest.mark.parametrize("surface", SURFACES)
def test_ggn_is_the_loss_curvature_seen_through_the_network(surface: Surface) -> None:
    by_hand, weights = outputs_and_weights(surface)
    x, _ = samples()
    logits = by_hand(x)
    rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in logits.flatten()]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    p = logits.detach().softmax(1)
    total = torch.zeros(42, 42, dtype=torch.float64)
    for i in range(len(x)):
        j = jacobian[3 * i : 3 * i + 3]
        total += j.T @ (p[i].diag() - torch.outer(p[i], p[i])) @ j / len(x)
    found = products(ggn(small_net(), crossentropy, small_batches(), surface))
    torch.testing.assert_close(found, vectors(42) @ total, rtol=0, atol=1e-11 * float(total.abs().max()))


@pytest.mark.parametrize("make", [hessian, ggn, fisher])
def test_it_does_not_matter_how_the_data_is_cut(make: type[CurvatureOperator]) -> None:
    net = small_net()
    v = torch.randn(42, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, parts = (make(net, crossentropy, small_batches(cuts)).matvec(v) for cuts in ((7,), (1, 4, 2)))
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=0)


def test_kept_graphs_give_the_same_products() -> None:
    net, calls = small_net(), []

    def counted(network: Any, batch: Any) -> Tensor:
        calls.append(len(batch[1]))
        return crossentropy(network, batch)

    kept = CurvatureOperator("hessian", net, counted, small_batches(), keep_graphs=True)
    before = len(calls)
    found = products(kept)
    assert torch.equal(found, products(hessian(net, crossentropy, small_batches())))
    assert len(calls) - before == len(CUTS), "one evaluation of each batch for all products"


def test_clipped_weights_make_the_surfaces_differ() -> None:
    net = small_net()
    torch.testing.assert_close(
        *(products(hessian(small_net("minmax"), crossentropy, small_batches(), surface)) for surface in SURFACES)
    )
    net[4].weight_quantizer.raw_scale.data.mul_(0.2)
    quantized, latent = (products(hessian(net, crossentropy, small_batches(), surface)) for surface in SURFACES)
    assert float((quantized - latent).abs().max()) > 0.1 * float(quantized.abs().max())


def test_the_network_is_left_as_it_was() -> None:
    net = small_net().train()
    before = copy.deepcopy(net.state_dict())
    for make in (hessian, ggn, fisher):
        make(net, crossentropy, small_batches()).matvec(torch.ones(42, dtype=torch.float64))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(layer.weight_offset is None for _, layer in quant_layers(net))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("select", "names"), [("4", ["4.weight"]), (["0", "1"], ["0.weight", "1.weight"]), ("[04]", list(WEIGHTS))]
)
def test_a_selection_is_the_block_of_the_whole(select: str | list[str], names: list[str], surface: Surface) -> None:
    net = small_net()
    kinds = ("weight", "norm_weight")
    operator = hessian(net, crossentropy, small_batches(), surface, select, kinds)
    assert list(operator.layout) == names
    dense = dense_hessian(net, surface, names)
    torch.testing.assert_close(matrix(operator), dense, rtol=0, atol=1e-11 * float(dense.abs().max()))
    assert operator.settings["select"] == ([select] if isinstance(select, str) else select)


@pytest.mark.parametrize("surface", SURFACES)
def test_other_parameters_are_variables_where_asked_for(surface: Surface) -> None:
    net = small_net()
    kinds = ("bias", "norm_bias", "input_range")
    operator = hessian(net, crossentropy, small_batches((7,)), surface, kinds=kinds)
    names = ["0.input_quantizer.raw_scale", "1.bias", "4.bias", "4.input_quantizer.raw_scale"]
    assert sorted(operator.layout) == sorted(names)
    loss, point = flat_loss(net, list(operator.layout))
    dense = torch.autograd.functional.hessian(loss, point)
    torch.testing.assert_close(matrix(operator), dense, rtol=0, atol=1e-11 * float(dense.abs().max()))


def test_a_plain_network_needs_no_conversion() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    found = [products(hessian(net, crossentropy, small_batches(), surface)) for surface in SURFACES]
    loss, point = flat_loss(net, ["1.weight"])
    torch.testing.assert_close(found[0], vectors(48) @ torch.autograd.functional.hessian(loss, point))
    assert torch.equal(*found)


class Idle(nn.Module):
    """A network with a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(16, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x.flatten(1))
        return y


def test_unused_parameters_are_left_out_and_named() -> None:
    operator = hessian(Idle().double(), crossentropy, small_batches())
    assert (list(operator.layout), operator.unused) == (["used.weight"], ["idle.weight"])
    assert operator.settings["unused"] == ["idle.weight"]
    with pytest.raises(ValueError, match="depends on none of idle.weight"):
        hessian(Idle().double(), crossentropy, small_batches(), select="idle")


def test_fixed_codes_have_no_latent_weights() -> None:
    net = deployed(small_net())
    assert hessian(net, crossentropy, small_batches(), "quantized").size == 42
    with pytest.raises(ValueError, match="surface=quantized"):
        hessian(net, crossentropy, small_batches(), "latent")


def test_a_loss_without_curvature_has_a_hessian_of_zeros() -> None:
    operator = hessian(Idle().double(), lambda network, batch: network(batch[0]).mean(), small_batches())
    assert torch.equal(operator.matvec(torch.ones(48, dtype=torch.float64)), torch.zeros(48, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surface": "loss"}, "surface=loss: use one of quantized, latent"),
        ({"select": "layer9"}, "select=layer9: .* use one of 0, 4"),
        ({"kinds": ("other",)}, "kinds=other"),
        ({"kind": "jacobian"}, "operator=jacobian: use one of hessian, ggn, fisher"),
        ({"batches": FixedBatches(())}, "no batches"),
    ],
)
def test_what_a_user_gets_wrong(change: dict[str, object], message: str) -> None:
    arguments = {"kind": "hessian", "net": small_net(), "loss": crossentropy, "batches": small_batches()}
    with pytest.raises(ValueError, match=message):
        CurvatureOperator(**{**arguments, **change})


def test_compiled_networks_are_refused() -> None:
    net = small_net()
    net._compiled_call_impl = net._call_impl  # what compile() leaves, without a compiler
    with pytest.raises(ValueError, match="compile=network"):
        hessian(net, crossentropy, small_batches())
    assert hessian(copy.deepcopy(net), crossentropy, small_batches()).size == 42, "a copy is eager"


class Restless(nn.Module):
    """Noise, or a counter, even in evaluation mode."""

    calls: Tensor

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(16, 3), noise
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.noise == 0:
            self.calls += 1
        y: Tensor = self.linear(x.flatten(1) + self.noise * torch.randn_like(x.flatten(1)))
        return y


@pytest.mark.parametrize(("noise", "message"), [(0.1, "without noise"), (0.0, "calls moved")])
def test_networks_that_do_not_hold_still_are_refused(noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian(Restless(noise).double(), crossentropy, small_batches())


def test_a_loss_that_is_not_finite_is_refused() -> None:
    net = small_net()
    net[4].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        hessian(net, crossentropy, small_batches())


def test_the_settings_say_what_was_measured() -> None:
    settings = hessian(small_net(), crossentropy, small_batches(), "latent").settings
    assert settings["operator"] == "hessian" and settings["surface"] == "latent" and settings["dtype"] == "float64"
    assert settings["size"] == 42 and settings["data"]["samples"] == sum(CUTS)
    assert settings["loss"] == pytest.approx(crossentropy(small_net(), samples()).item())


def test_asymmetry_of_true_curvature_is_rounding() -> None:
    assert asymmetry(hessian(small_net(), crossentropy, small_batches())) < 1e-12
