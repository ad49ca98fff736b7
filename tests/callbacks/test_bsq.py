"""BSQ: golden vectors of the official layer, re-quantization that changes no value, and the mechanic."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from callbacks.bsq import BSQ
from callbacks.bsq.quantizer import BitStacks
from callbacks.bsq.stacks import group_lasso, halved, plane_digits, requantized, rounded
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation
from research.quant.layers import quant_layers
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ as LSQQuantizer
from tests.callbacks.searches import THREE, on_residual, only_mechanic
from tests.learning.tiny import StopAt, fit, state

SLUG = "bsq"
DOUBLE = torch.float64


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(value) for name, value in golden("csq").items()}
    return {key.removeprefix("bsq_"): value for key, value in found.items() if key.startswith("bsq_")}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-8, atol=1e-12)


def stacks(positive: Tensor, negative: Tensor, scale: Tensor, planes: int) -> BitStacks:
    """The quantizer, in float64, with these stacks (*shape, n) as its last n of ``planes`` planes."""
    *shape, live = positive.shape
    found = BitStacks(LSQQuantizer(QuantizerSpec("lsq", 4, signed=True), shape, None, "weight"), planes).double()
    for stack, parameter in ((positive, found.positive), (negative, found.negative)):
        parameter.data[planes - live :] = stack.movedim(-1, 0).reshape(live, -1)
    found.live.fill_(live)
    found.raw_scale.data.copy_(scale.reshape(()))
    return found


def official(parameter: Tensor, live: int, like: Tensor) -> Tensor:
    """The live planes in the official layout, planes last."""
    return parameter[-live:].reshape(live, *like.shape[:-1]).movedim(0, -1)


@pytest.mark.parametrize("planes", [4, 7])
def test_golden_convolution_and_its_gradients(vectors: dict[str, Tensor], planes: int) -> None:
    p = vectors["pbits"]
    layer = stacks(p, vectors["nbits"], vectors["scale"], planes)
    out = conv2d(vectors["x"], layer(p[..., 0]), padding=1)
    same(out, vectors["out"])
    (out * vectors["gout"]).sum().backward()
    same(official(layer.positive.grad, 4, p), vectors["grad_pbits"])
    same(official(layer.negative.grad, 4, p), vectors["grad_nbits"])
    same(layer.raw_scale.grad.reshape(1), vectors["grad_scale"])
    assert int(layer.positive.grad[: planes - 4].count_nonzero()) == 0


@pytest.mark.parametrize("planes", [4, 7])
def test_golden_group_lasso(vectors: dict[str, Tensor], planes: int) -> None:
    p = vectors["pbits"]
    layer = stacks(p, vectors["nbits"], vectors["scale"], planes)
    penalty = p[..., 0].numel() * layer.live * group_lasso(layer.positive, layer.negative, layer.live_planes)
    same(penalty, vectors["reg"])
    penalty.backward()
    same(official(layer.positive.grad, 4, p), vectors["reg_grad_pbits"])


def test_golden_requantization(vectors: dict[str, Tensor]) -> None:
    p = vectors["pbits"]
    layer = stacks(p, vectors["nbits"], vectors["scale"], 7)
    layer.requantize()
    live = int(vectors["requant_nbits"])
    assert int(layer.live) == live and int(layer.bits) == live + 1
    same(official(layer.positive, live, p), vectors["requant_pbits"])
    same(official(layer.negative, live, p), vectors["requant_nbitsneg"])
    same(layer.raw_scale.reshape(1), vectors["requant_scale"])


def stack_of(codes: list[int], live: int, planes: int = 7) -> BitStacks:
    """Exact digits of codes with ``live`` planes, at a scale of 1."""
    k = torch.tensor(codes)
    digits = plane_digits(k, live).movedim(0, -1).double()
    return stacks(digits * (k > 0)[:, None], digits * (k < 0)[:, None], torch.ones(1), planes)


@pytest.mark.parametrize(
    ("codes", "live", "left"),
    [
        ([5, -3, 1, 0], 3, 3),  # nothing to drop
        ([4, -8, 12, 0], 4, 2),  # two empty last planes
        ([1, -3, 2, 0], 5, 2),  # three empty first planes
        ([4, -4, 0, 0], 6, 1),  # both
        ([0, 0, 0, 0], 4, 1),  # never below one
    ],
)
def test_empty_planes_go_without_a_trace(codes: list[int], live: int, left: int) -> None:  # check 8
    layer = stack_of(codes, live)
    before = layer(layer.positive).detach()
    layer.requantize()
    assert int(layer.live) == left
    torch.testing.assert_close(layer(layer.positive).detach(), before, rtol=1e-12, atol=0)
    again = layer.positive.detach().clone()
    layer.requantize()
    assert torch.equal(layer.positive, again)


def test_values_inside_the_range_are_only_rounded() -> None:  # check 8
    generator = torch.Generator().manual_seed(0)
    p, n = (torch.rand(40, 4, dtype=DOUBLE, generator=generator) for _ in range(2))
    layer = stacks(p, n, torch.tensor([0.3]), 7)
    assert float(layer.units().abs().max()) <= 15
    before = layer(p[:, 0]).detach()
    layer.requantize()
    torch.testing.assert_close(layer(p[:, 0]).detach(), before, rtol=1e-12, atol=1e-15)


def test_a_layer_that_has_outgrown_its_planes_gets_one_more() -> None:  # check 8
    units = torch.tensor([9.2, -3.0, 5.1], dtype=DOUBLE)
    found = requantized(units, torch.tensor(0.1, dtype=DOUBLE), torch.tensor(3), 7)
    assert (found.codes.tolist(), int(found.planes)) == ([9, -3, 5], 4)
    assert float(found.step) == pytest.approx(0.1)
    clipped = requantized(units, torch.tensor(0.1, dtype=DOUBLE), torch.tensor(3), 3)
    assert (clipped.codes.tolist(), int(clipped.planes)) == ([7, -3, 5], 3)


def test_rounding_and_clamping_pass_the_gradient() -> None:
    units = torch.tensor([-9.0, 0.4, 30.0], requires_grad=True)
    found = rounded(units, torch.tensor(7))
    assert found.tolist() == [-7.0, 0.0, 7.0]
    (gradient,) = torch.autograd.grad(found.sum(), units)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


def test_a_plane_given_up_is_rounded_away() -> None:
    assert halved(torch.tensor([7, -6, 5, 1, 0]), torch.tensor(3)).tolist() == [3, -3, 2, 0, 0]
    layer = stack_of([7, -6, 5, 1, 0], 3)
    step = float(layer.scale)
    assert layer.halving_error() == pytest.approx(step**2 * (1 + 0 + 1 + 1 + 0) / 5)
    layer.halve()
    assert int(layer.live) == 2
    torch.testing.assert_close(layer(layer.positive), 2 * step * torch.tensor([3, -3, 2, 0, 0], dtype=DOUBLE))


# -- the mechanic --------------------------------------------------------------------------------------------------


def bsq(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.bsq.BSQ", "budget": THREE, **options}}


def searching(**options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, BSQ on it."""
    return on_residual(bsq(**options))


def mechanic(module: QuantModule) -> BSQ:
    return only_mechanic(module, BSQ)


class Widths(pl.Callback):
    """The allocation that every step was computed with, and what the lasso added."""

    def __init__(self) -> None:
        self.seen: list[Allocation] = []
        self.penalised: list[bool] = []

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Any) -> None:
        self.seen.append(Allocation.of(module.net))
        self.penalised.append(bool(mechanic(module).loss_terms(None)))  # type: ignore[arg-type]


def test_widths_change_at_re_quantizations_and_end_within_the_budget() -> None:
    module, widths = searching(interval=0.25, until=0.75, strength=1.0, lr_factor=10.0), Widths()
    fit(module, callbacks=(widths,))
    assert widths.seen[0] == widths.seen[1] and widths.seen[2] == widths.seen[3] and widths.seen[6] == widths.seen[7]
    assert widths.penalised == [True] * 6 + [False] * 2
    found = mechanic(module)
    (budget,) = found.budgets
    assert budget.cost(found.counts, widths.seen[0]) == 8
    assert budget.met(found.counts, widths.seen[-1])
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in widths.seen)
    assert bool(found.state.fixed) and int(found.state.mark) == 6


def test_the_lasso_of_a_layer_is_weighed_by_its_weights_and_its_live_planes() -> None:
    module = searching(strength=0.3)
    found, generator = mechanic(module), torch.Generator().manual_seed(0)
    expected, weights = 0.0, 0
    for index, each in enumerate(found.quantizers.values()):
        live, count = 7 - index, math.prod(each.shape)
        each.live.fill_(live)
        for digits in (each.positive, each.negative):
            digits.data.copy_(torch.rand(digits.shape, generator=generator))
        energies = torch.cat([each.positive[-live:], each.negative[-live:]], dim=1).detach().square().sum(1)
        expected += count * live * sum(math.sqrt(1e-8 + energy) for energy in energies.tolist())
        weights += count
    (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
    assert term.item() == pytest.approx(0.3 * expected / weights, rel=1e-5)


def test_the_lasso_empties_planes() -> None:
    wide, narrow = (
        searching(strength=strength, lr_factor=20.0, interval=0.1, until=0.9, budget={**THREE, "value": 8})
        for strength in (0.0, 3.0)
    )
    costs = []
    for module in (wide, narrow):
        fit(module, max_epochs=5)
        costs.append(mechanic(module).budgets[0].cost(mechanic(module).counts, Allocation.of(module.net)))
    assert costs[1] < costs[0] - 1


@pytest.mark.parametrize(("value", "halved_layers"), [(7.99, [5]), (7.49, [0, 5])])
def test_layers_give_up_the_planes_that_change_a_weight_least(value: float, halved_layers: list[int]) -> None:
    module = searching(budget={**THREE, "value": value})
    found, generator = mechanic(module), torch.Generator().manual_seed(0)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    planes = list(found.quantizers.values())
    for size, each in zip(
        (0.6, 4.0, 3.0, 2.0, 5.0, 0.5), planes, strict=True
    ):  # the last layer has half of all weights
        each.initialise(size * torch.rand(each.shape, generator=generator))
    found.settle(found.quantizers)
    assert [index for index, each in enumerate(planes) if int(each.live) < 7] == halved_layers


def test_the_end_is_exactly_the_network_that_was_trained() -> None:
    module = searching(until=0.5, lr_factor=10.0)
    fit(module)
    net, layers = finalise(module)["final"], dict(quant_layers(module.net))
    for name, layer in quant_layers(net):
        assert type(layer.weight_quantizer) is LSQQuantizer
        torch.testing.assert_close(layer.quantized_weight(), layers[name].quantized_weight(), rtol=1e-6, atol=1e-8)
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(net(images), module.eval()(images))
    assert Allocation.of(net) == Allocation.of(module.net)


def test_before_the_widths_are_fixed_the_exact_form_is_within_the_budget_too() -> None:
    module = searching(until=1.0, interval=1.0)
    fit(module, max_epochs=1, limit_train_batches=3, max_steps=1)
    found, before = mechanic(module), Allocation.of(module.net)
    assert not bool(found.state.fixed)
    assert found.budgets[0].met(found.counts, Allocation.of(finalise(module)["final"]))
    assert Allocation.of(module.net) == before


def test_digits_stay_in_range_and_momenta_are_forgotten() -> None:
    module = searching(interval=0.25, until=0.75, lr_factor=100.0)
    momenta = []

    class Check(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, host: Any, loss: Any) -> None:
            momenta.append(bool(trainer.optimizers[0].state))

        def on_train_batch_end(self, trainer: pl.Trainer, host: Any, *arguments: Any) -> None:
            for each in mechanic(host).quantizers.values():
                for digits in (each.positive, each.negative):
                    assert digits.min() >= 0 and digits.max() <= 2

    fit(module, callbacks=(Check(),))
    assert momenta == [False, True] * 4  # none in front of step 0, nor behind a re-quantization in front of 2, 4, 6


def test_a_crash_in_front_of_a_re_quantization_leaves_no_trace(tmp_path: Path) -> None:
    options = {"interval": 0.25, "until": 0.75, "strength": 1.0, "lr_factor": 10.0}
    whole = searching(**options)
    fit(whole, folder=tmp_path / "whole")
    for stop in (3, 7):
        folder = tmp_path / str(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(searching(**options), folder=folder, callbacks=(StopAt(stop),))
        pl.seed_everything(99, verbose=False)
        resumed = searching(**options)
        fit(resumed, folder=folder, resume=folder / "checkpoints/last.ckpt")
        assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


@pytest.mark.parametrize(
    ("total", "options", "steps"),
    [
        (100, {}, [15, 30, 45, 55]),
        (20, {"interval": 0.5, "until": 0.5}, [10]),
        (2, {}, [1]),
        (10, {"interval": 0.3, "until": 1.0}, [3, 6, 9]),
    ],
)
def test_when_widths_are_re_quantized(total: int, options: dict[str, float], steps: list[int]) -> None:
    found = BSQ(budget=THREE, **options)  # type: ignore[arg-type]
    assert [step for step in range(total) if found.is_due(step, total)] == steps


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"callbacks.bsq.budget.value=1.5: feasible are 2 to 8 bits per weight"):
        fit(searching(budget={**THREE, "value": 1.5}), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes": 0}, "planes=0"),
        ({"strength": -1.0}, "strength=-1"),
        ({"interval": 0.0}, "interval=0"),
        ({"until": 0.0}, "until=0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.bsq.{message}"):
        BSQ(**{"budget": THREE, **options})
