"""BMPQ as a mechanic: what is assigned when, within which budget, and what it leaves alone."""

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.bmpq import BMPQ
from callbacks.bmpq.assignment import bit_values
from callbacks.bmpq.widths import change_widths
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.calibrate import calibrate
from research.quant.cost import LayerCost
from research.quant.ilp import allocate
from research.quant.layers import quant_layers
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import LSQ, RESNET, StopAt, fit, float_weights, make_module, state, tiny_net

SLUG = "bmpq"
OWN: dict[str, Any] = {
    "weight": {"name": "callbacks.bmpq.MaxScale", "bits": 4},
    "input": {"name": "pact", "bits": 4, "signed": "auto"},
    **ENDS,
}


def bmpq(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.bmpq.BMPQ", "budget": THREE, **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, BMPQ on it."""
    return on_residual(bmpq(**options), quantizer)


def mechanic(module: QuantModule) -> BMPQ:
    return only_mechanic(module, BMPQ)


class Widths(pl.Callback):
    """The allocation that every step was computed with."""

    def __init__(self) -> None:
        self.seen: list[Allocation] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.seen.append(Allocation.of(module.net))


def sizes(*weights: int) -> Counts:
    """A network of layers l0, l1, ... with these numbers of weights."""
    bits = torch.tensor(32.0)
    layers = [LayerCost(f"l{i}", n, n, n, 1, 9, 0, 0, bits, bits) for i, n in enumerate(weights)]
    return Counts(tuple(layers), "l0", f"l{len(weights) - 1}")


def assigned(enbg: list[float], counts: Counts, value: float, widths: tuple[int, ...] = (2, 4)) -> list[int]:
    """Bits of the layers by the mechanic's objective within a size."""
    choices = {layer.name: [LayerBits(bits, bits) for bits in widths] for layer in counts.layers}
    objective = bit_values(dict(zip(choices, enbg, strict=True)), choices)
    return [bits.weight for bits in allocate(objective, counts, [Budget("size", value)]).values()]


def test_assignments_equal_brute_force_and_keep_the_budget() -> None:  # check 5
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(10, 1000, (5,), generator=generator).tolist()
        enbg = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        value = int(sum(numbers) * (2 + 2 * torch.rand((), generator=generator)))
        found = assigned(enbg, sizes(*numbers), value, (2, 3, 4))

        def worth(bits: tuple[int, ...] | list[int], enbg: list[float] = enbg) -> float:
            return sum(e * b for e, b in zip(enbg, bits, strict=True))

        feasible = [b for b in itertools.product((2, 3, 4), repeat=5) if sum(map(int.__mul__, numbers, b)) <= value]
        assert sum(map(int.__mul__, numbers, found)) <= value
        assert worth(found) == pytest.approx(max(map(worth, feasible)), rel=1e-12)


def test_one_bit_below_the_whole_budget_the_least_sensitive_layer_drops() -> None:  # check 5
    counts, enbg = sizes(500, 20, 300, 40, 900), [0.5, 0.4, 0.1, 0.3, 0.2]
    assert assigned(enbg, counts, 4 * 1760) == [4, 4, 4, 4, 4]
    assert assigned(enbg, counts, 4 * 1760 - 1) == [4, 4, 2, 4, 4]


def test_more_sensitivity_never_costs_bits() -> None:  # check 6
    counts = sizes(100, 100, 100, 100)
    assert sorted(assigned([0.25] * 4, counts, 1200)) == [2, 2, 4, 4]
    before = 0
    for value in (0.0, 0.1, 0.2, 0.3, 0.5, 2.0):
        bits = assigned([value, 0.15, 0.25, 0.4], counts, 1200)[0]
        assert bits >= before
        before = bits
    assert before == 4


@pytest.mark.parametrize("quantizer", [{**LSQ, **ENDS}, OWN], ids=["lsq", "own"])
def test_the_widest_first_then_within_the_budget_and_ends_stay(quantizer: dict[str, Any]) -> None:  # check 7
    module, widths = searching(quantizer, warmup=0.25, interval=0.25, until=0.5), Widths()
    fit(module, callbacks=(widths,))
    assert len(widths.seen) == 8
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in widths.seen)
    inner = [[bits for name, bits in seen.items() if name not in ("conv1", "fc")] for seen in widths.seen]
    assert all(set(bits) == {(4, 4)} for bits in inner[:2])
    assert all(set(bits) == {(2, 2), (4, 4)} for bits in inner[2:])
    assert inner[2] == inner[3] and inner[4] == inner[7]
    found, budget = mechanic(module), mechanic(module).budgets[0]
    assert all(budget.met(found.counts, seen) for seen in widths.seen[2:])
    assert int(found.state.assigned_at) == 4 and int(found.state.steps) == 4
    net = finalise(module)["final"]
    assert Allocation.of(net) == widths.seen[-1]
    rebuilt = finalise(searching(quantizer))["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert Allocation.of(rebuilt) == widths.seen[-1]


def test_the_counted_gradients_are_those_of_the_step_before_clipping() -> None:  # check 4, in training
    module = searching(warmup=0.5, interval=0.5, until=0.5)
    found, expected = mechanic(module), []

    class Backward(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, host: Any) -> None:
            values = []
            for layer in found.layers.values():
                codes_apart = layer.weight_quantizer.scale.detach()  # type: ignore[union-attr]
                norms = [(layer.weight.grad * codes_apart * c).square() for c in (-8, 4, 2, 1)]  # type: ignore[operator]
                values.append(torch.stack(norms).sum(0).sqrt().mean())
            expected.append(torch.stack(values))

    fit(module, max_epochs=1, limit_train_batches=2, gradient_clip_val=1e-3, callbacks=(Backward(),))
    assert int(found.state.assigned_at) == 1 and int(found.state.steps) == 1  # anew behind the first step
    fit(other := searching(warmup=0.9, until=0.9), max_epochs=1, limit_train_batches=1, gradient_clip_val=1e-3)
    torch.testing.assert_close(mechanic(other).enbg("raw"), expected[0])
    torch.testing.assert_close(mechanic(other).enbg("per_bit") * 85**0.5, expected[0])


def decided(loss_factor: float) -> tuple[Tensor, Allocation]:
    module = searching(warmup=0.5, interval=0.5, until=0.5)
    found = mechanic(module)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(module.net, [images])
    found.prepare(module, [(images, torch.zeros(8))])
    (loss_factor * module.net(images).square().mean()).backward()
    found.on_before_optimizer_step(None, module, None)  # type: ignore[arg-type]
    enbg = found.enbg("raw")
    found.reassign(1)
    return enbg, Allocation.of(module.net)


def test_the_scale_of_the_loss_changes_no_decision() -> None:  # check 4
    (one, first), (other, second) = decided(1.0), decided(64.0)
    torch.testing.assert_close(other, 64 * one)
    assert first == second
    assert {bits.weight for bits in first.values()} == {2, 4, 8}


def test_one_candidate_is_plain_training_bit_for_bit() -> None:  # check 8
    trained = []
    for mechanics in ({}, bmpq(bits=[4], budget={"kind": "average_bits", "value": 4}, search_ends=True)):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_the_largest_layer_keeps_its_bits_only_where_it_is_worth_it() -> None:
    found = {}
    for assign in ("sensitive", "inverted", "random"):
        module = searching(assign=assign)
        bmpq_of = mechanic(module)
        bmpq_of.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
        bmpq_of.state.add(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 99.0]))  # the last has about half of all weights
        bmpq_of.reassign(7)
        found[assign] = Allocation.of(module.net)
        assert bmpq_of.budgets[0].met(bmpq_of.counts, found[assign])
        assert int(bmpq_of.state.steps) == 0 and int(bmpq_of.state.assigned_at) == 7
    assert found["sensitive"]["layer3.0.conv2"] == (4, 4)
    assert found["inverted"]["layer3.0.conv2"] == (2, 2)


@pytest.mark.parametrize(("norm", "widths"), [("raw", (2, 4)), ("per_bit", (4, 2))])
def test_the_norm_decides_between_layers_of_unequal_width(norm: str, widths: tuple[int, int]) -> None:
    module = searching(norm=norm, budget={**THREE, "value": 2.07})  # 4 bits for one of the smallest layers
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    change_widths(module.net, Allocation({**Allocation.of(module.net), "layer1.0.conv1": LayerBits(2, 2)}))
    found.state.add(torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0, 0.0]))  # raw: times the roots of 5 and of 85
    found.reassign(7)
    present = Allocation.of(module.net)
    assert (present["layer1.0.conv1"].weight, present["layer1.0.conv2"].weight) == widths


def test_inputs_of_a_fixed_width_and_the_ends_too() -> None:
    module = searching({**LSQ}, input_bits=3, search_ends=True, budget={"kind": "size", "value": 12000}, bits=[2, 8])
    fit(module, max_epochs=1)
    found = Allocation.of(module.net)
    assert {bits.input for bits in found.values()} == {3}
    assert {bits.weight for bits in found.values()} == {2, 8}


def test_ranges_follow_a_new_width() -> None:
    module = searching()
    fit(module, max_epochs=1, limit_train_batches=1)
    net = module.net
    wide = Allocation.of(net)
    layers = dict(quant_layers(net))
    name = next(iter(mechanic(module).layers))
    layer, untouched = layers[name], layers["fc"]
    weight, step = layer.weight_quantizer, layer.input_quantizer.raw_scale.detach().clone()
    other = untouched.weight_quantizer.raw_scale.detach().clone()
    changed = change_widths(net, Allocation({**wide, name: LayerBits(2, 2)}))
    assert changed == 1
    torch.testing.assert_close(layer.input_quantizer.raw_scale, step * (15 / 3) ** 0.5)
    torch.testing.assert_close(weight.raw_scale, 2 * layer.weight.abs().mean())  # init: lsq, qmax 1
    assert torch.equal(untouched.weight_quantizer.raw_scale, other)
    change_widths(net, wide)
    torch.testing.assert_close(layer.input_quantizer.raw_scale, step)


def test_a_crash_in_front_of_an_assignment_leaves_no_trace(tmp_path: Path) -> None:
    options = {"warmup": 0.5, "interval": 0.25, "until": 0.8}  # assignments in front of steps 4 and 6
    whole = searching(**options)
    fit(whole, folder=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(searching(**options), folder=tmp_path / "parts", callbacks=(StopAt(5),))
    pl.seed_everything(99, verbose=False)
    resumed = searching(**options)
    fit(resumed, folder=tmp_path / "parts", resume=tmp_path / "parts/checkpoints/last.ckpt")
    assert int(mechanic(resumed).state.assigned_at) == 6
    assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


@pytest.mark.parametrize(
    ("total", "options", "steps"),
    [
        (100, {}, [10, 20, 30, 40, 50, 60, 70]),
        (3910, {}, [391, 782, 1173, 1564, 1955, 2346, 2737]),
        (2, {}, [1]),
        (10, {"warmup": 0.0, "interval": 0.4, "until": 0.0}, [1]),
        (20, {"warmup": 0.25, "interval": 0.5, "until": 0.9}, [5, 15]),
    ],
)
def test_when_widths_are_assigned(total: int, options: dict[str, float], steps: list[int]) -> None:
    found = BMPQ(budget=THREE, **options)
    assert [step for step in range(total) if found.is_due(step, total)] == steps


def test_metrics_name_widths_and_both_norms() -> None:
    module = searching()
    trainer = fit(module, max_epochs=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {name: value for name, value in logged.items() if name.startswith("bits/")} == Allocation.of(
        module.net
    ).metrics()
    for name, bits in Allocation.of(module.net).items():
        if name in mechanic(module).layers:
            ratio = logged[f"bmpq/enbg_raw/{name}"] / logged[f"bmpq/enbg_per_bit/{name}"]
            assert ratio == pytest.approx(((4**bits.weight - 1) / 3) ** 0.5, rel=1e-5)


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, _ = allocation_left(module, tmp_path)
    assert left == Allocation.of(module.net)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    module = searching(budget={**THREE, "value": 1.5})
    with pytest.raises(ValueError, match=r"callbacks.bmpq.budget.value=1.5: feasible are 2 to 4 bits per weight"):
        fit(module, max_epochs=1)


def test_weights_of_the_warm_up_are_not_deployed(tmp_path: Path) -> None:
    module = make_module(
        bmpq(), model=RESNET, checkpoint=float_weights(tmp_path / "f.safetensors", RESNET), quantizer={**LSQ, **ENDS}
    )
    fit(module, max_epochs=1, limit_train_batches=1)
    with pytest.raises(ValueError, match=r"callbacks.bmpq: .*use finalise.weights=last"):
        finalise(module)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    widest = {name: options[-1] for name, options in mechanic(module).choices.items()}
    Allocation(widest).apply(module.net)
    with pytest.raises(ValueError, match=r"callbacks.bmpq.budget.value=3: the widths cost 4 bits per weight"):
        finalise(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [1, 2]}, "bits"),
        ({"bits": []}, "bits"),
        ({"input_bits": "all"}, "input_bits=all"),
        ({"norm": "l1"}, "norm=l1"),
        ({"assign": "best"}, "assign=best"),
        ({"warmup": 0.8}, ".*warmup=0.8, until=0.7"),
        ({"interval": 0}, "interval=0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.bmpq[.:]{message}"):
        BMPQ(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({}, "no quantized weight"),
        ({**LSQ, "weight": {"name": "dorefa", "bits": 4}}, "quantizer.weight.name=dorefa"),
        ({**LSQ, "input": {"name": "ewgs", "bits": 4}}, "quantizer.input.name=ewgs"),
        ({**LSQ, "widths": [2, 4]}, "quantizer.weight.name=lsq"),
        ({**LSQ, "fold_bn": 2}, "use quantizer.fold_bn=none"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(quantizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.bmpq: .*{message}"):
        make_module(bmpq(), model=RESNET, quantizer=quantizer)
