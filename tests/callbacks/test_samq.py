"""SAMQ as a mechanic: what switches, what a draw trains, what the policy costs, how a search ends."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.samq import SAMQ
from callbacks.samq.layers import leaders
from callbacks.samq.switched import SwitchedBatchNorm2d, SwitchedQuantizer
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.models.resnet import resnet18
from research.models.resnet_cifar import resnet8
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget
from research.quant.calibrate import calibrate
from research.quant.cost import count_norm_parameters
from research.quant.passes import passes, use_kernels
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual
from tests.learning.tiny import LSQ, RESNET, StopAt, fit, make_module, state, tiny_net

SLUG = "samq"
BOPS: dict[str, Any] = {"kind": "bops", "value": 300000, "convention": {"first_last": "excluded"}}
LIQ: dict[str, Any] = {"weight": {"name": "liq", "bits": 4}, "input": {"name": "liq", "bits": 4}, **ENDS}


def samq(**options: Any) -> dict[str, Any]:
    small = {"budget": THREE, "images": "train", "policy_batches": 2, "choice_batches": 1, "candidates": 3, "draws": 50}
    return {SLUG: {"_target_": "callbacks.samq.SAMQ", **small, **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, SAMQ on it."""
    return on_residual(samq(**options), quantizer)


def mechanic(module: QuantModule) -> SAMQ:
    (found,) = [each for each in module.active if isinstance(each, SAMQ)]
    return found


def inner(allocation: Allocation) -> list[LayerBits]:
    return [bits for name, bits in allocation.items() if name not in ("conv1", "fc")]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4


def prepared(module: QuantModule) -> SAMQ:
    """The mechanic of a calibrated host that knows what configurations cost."""
    calibrate(module.net, [batch()[0]])
    found = mechanic(module)
    found.prepare(module, [batch()])
    return found


class Watch(pl.Callback):
    """Widths of every step, and the states of the candidates before and after it."""

    def __init__(self) -> None:
        self.widths: list[Allocation] = []
        self.validated: list[Allocation] = []
        self.moved: list[set[tuple[str, str]]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self._before = state(module.net)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.widths.append(Allocation.of(module.net))
        after = state(module.net)
        names = [name for name, value in after.items() if not torch.equal(value, self._before[name])]
        self.moved.append({(name.split(".by_width.")[0], name.split(".")[-2]) for name in names if "by_width" in name})

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.validated.append(Allocation.of(module.net))


# -- switching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [{**LSQ, **ENDS}, LIQ], ids=["lsq", "liq"])
@pytest.mark.parametrize("kernels", [None, "eager"])
def test_a_configuration_is_the_network_of_its_widths(quantizer: dict[str, Any], kernels: Any) -> None:
    module = searching(quantizer)
    found, (images, labels) = prepared(module), batch()
    picks = [index % 4 for index in range(len(found.decisions))]
    found.use(picks)
    assert Allocation.of(module.net) == found.allocation(picks)
    found.state.over.fill_(True)
    found.budgets = [Budget("average_bits", 8.0)]
    plain = finalise(module)["final"]
    assert not any(isinstance(each, SwitchedQuantizer | SwitchedBatchNorm2d) for each in plain.modules())
    assert Allocation.of(plain) == Allocation.of(module.net)
    use_kernels(module.net, kernels)
    for training in (False, True):
        gradients = []
        for net in (module.net, plain):
            loss = torch.nn.functional.cross_entropy(net.train(training)(images), labels)
            net.zero_grad()
            loss.backward()
            width = {name: bits.weight for name, bits in found.allocation(picks).items()}
            gradients.append({plain_name(name, width): p.grad for name, p in net.named_parameters()})
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        others = [gradient for name, gradient in gradients[0].items() if name not in gradients[1]]
        assert others and all(gradient is not None and not gradient.any() for gradient in others)
    moved, alone = state(module.net), state(plain)
    norms = [name for name in alone if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    width = {name: bits.weight for name, bits in found.allocation(picks).items()}
    for name, value in moved.items():
        if plain_name(name, width) in norms:
            torch.testing.assert_close(value, alone[plain_name(name, width)], msg=name)
        elif name.endswith("num_batches_tracked"):
            assert int(value) == 0, "statistics of the picked copy only"


def plain_name(name: str, widths: dict[str, int]) -> str:
    """The name that a tensor has when the copies of its layer's width stand alone; of other copies its own."""
    place, _, rest = name.partition(".by_width.")
    if not rest:
        return name
    key, _, leaf = rest.partition(".")
    layer = place.rpartition(".")[0] if place.endswith("_quantizer") else place.replace("bn", "conv")
    return f"{place}.{leaf}" if int(key) == widths[layer] else name


def test_the_batchnorms_of_one_width_are_counted() -> None:
    module = searching(budget={"kind": "size", "value": 30000, "convention": {"count_norms": True}})
    expected = count_norm_parameters(on_residual({}).net)
    assert count_norm_parameters(module.net) == prepared(module).counts.norm_parameters == expected


def test_a_pass_at_other_widths_switches_too() -> None:
    module = searching()
    prepared(module)
    conv = module.net.layer1[0].conv1
    before = conv.quantized_weight()
    with passes(module.net, bits={"layer1.0.conv1.weight_quantizer": 2}):
        assert len(conv.quantized_weight().unique()) <= 4
        assert torch.equal(conv.quantized_weight(), conv.weight_quantizer.by_width["2"](conv.weight))
        codes = conv.weight_quantizer.codes(conv.weight)
        assert (int(codes.min()), int(codes.max())) == (-2, 1)
        assert torch.equal(conv.weight_quantizer.dequantize(codes), conv.quantized_weight())
    assert torch.equal(conv.quantized_weight(), before) and len(before.unique()) > 4


def test_shortcuts_copy_the_last_convolution_of_their_block() -> None:
    net = resnet8(shortcut="B")
    names = [name for name, each in net.named_modules() if isinstance(each, torch.nn.Conv2d)]
    assert leaders(net, names) == {
        "layer2.0.downsample.0": "layer2.0.conv2",
        "layer3.0.downsample.0": "layer3.0.conv2",
    }
    assert leaders(resnet18(), ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]) == {
        "layer2.0.downsample.0": "layer2.0.conv2"
    }
    module = make_module(samq(), model={**RESNET, "shortcut": "B"}, quantizer={**LSQ, **ENDS})
    found = mechanic(module)
    assert len(found.decisions) == len(found.layers) - 2 == 6
    found.use([0, 1, 2, 3, 0, 1])
    present = Allocation.of(module.net)
    assert present["layer2.0.downsample.0"] == present["layer2.0.conv2"] != present["layer2.0.conv1"]


def test_weight_and_input_have_one_width_and_float_inputs_stay_float() -> None:
    module = searching({"weight": LSQ["weight"], **ENDS})
    assert {bits.input for bits in inner(Allocation.of(module.net))} == {32}
    widths = inner(Allocation.of(searching().net))
    assert set(widths) == {LayerBits(5, 5)}


# -- training ----------------------------------------------------------------------------------------------------


def test_a_step_moves_what_it_drew_and_nothing_of_the_other_candidates() -> None:
    module, watch = searching(until=0.9), Watch()
    fit(module, callbacks=(watch,))
    found = mechanic(module)
    assert len({tuple(inner(each)) for each in watch.widths}) > 4
    for widths, moved in zip(watch.widths, watch.moved, strict=True):
        for place, key in moved:
            layer = place.rpartition(".")[0] if place.endswith("_quantizer") else place.replace("bn", "conv")
            assert int(key) == widths[layer].weight, (place, key)
        assert {place for place, _ in moved if "bn" in place} == {
            norm for conv, norm in module.net.structure().conv_bn if conv in found.layers
        }


def test_every_step_has_its_own_draw_and_all_its_evaluations_the_same() -> None:
    runs = []
    for seed in (0, 0, 1):
        module = make_module(samq(until=0.9), seed=seed, model=RESNET, quantizer={**LSQ, **ENDS})
        watch = Watch()
        fit(module, callbacks=(watch,), accumulate_grad_batches=2)
        runs.append(watch.widths)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second, third = runs[0][:3]
    assert first == second and second != third


def test_one_candidate_is_plain_training_bit_for_bit() -> None:
    trained = []
    for mechanics in ({}, samq(bits=[4], budget={"kind": "average_bits", "value": 4}, search_ends=True)):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_the_policy_is_in_no_optimizer_of_the_network() -> None:
    module = searching()
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    own = set(mechanic(module).policy.parameters())
    assert not own & {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not own & set(module.parameters())


def test_validation_sees_the_most_probable_configuration_and_training_goes_on_with_its_own() -> None:
    module, watch = searching(until=0.9, lr=1e-9), Watch()
    found = mechanic(module)
    favourite = found.allocation(found.policy.most_probable().tolist())
    fit(module, callbacks=(watch,), val_check_interval=2)
    assert len(watch.validated) == 4 and set(watch.validated[:3]) == {favourite}
    assert watch.widths[1] != favourite and watch.validated[3] == watch.widths[-1]


# -- the policy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "strength"), [(None, 45.0), (1e4, 45.0 * (1e4 / 300000) ** 2)])
def test_the_objective_of_the_policy_in_its_relative_and_in_its_absolute_form(
    unit: float | None, strength: float
) -> None:
    module = searching(budget=BOPS, unit=unit, strength=strength)
    found, seen = prepared(module), []
    found.learner.step = lambda picks, cost: seen.append((picks[0].tolist(), cost)) or 0.0  # type: ignore[func-returns-value, method-assign, assignment]
    means = found.train_policy(iter([batch()]), torch.Generator().manual_seed(0))
    ((picks, cost),) = seen
    found.use(picks)
    module.eval()
    loss = float(module.objective(batch()).loss.detach())
    distance = found.budget.cost(found.counts, found.allocation(picks)) / 300000 - 1
    assert abs(distance) > 0.01
    assert cost == pytest.approx(loss + 45 * distance**2, rel=1e-5)
    assert means["objective"] == cost and means["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("layers", ["all", "ends"])
def test_with_saq_the_policy_sees_the_loss_at_the_perturbed_point(layers: str) -> None:
    module = on_residual({**samq(), "saq": {"_target_": "callbacks.saq.SAQ", "rho": 0.5, "layers": layers}})
    found = prepared(module)
    assert found.measure == "sharpness"
    before = state(module)
    perturbed, plain = found.losses(list(batch()))
    assert float(perturbed) > float(plain)
    module.eval()
    torch.testing.assert_close(plain, module.evaluate(batch()).loss.detach())
    assert all(torch.equal(value, before[name]) for name, value in state(module).items()), "nothing moves"
    found._loader = Loader()
    configurations = [(0,) * 6, (3,) * 6]
    values = found.sharpness(configurations)
    for picks, value in zip(configurations, values, strict=True):
        found.use(picks)
        perturbed, plain = found.losses(list(batch()))
        assert value == pytest.approx(float(perturbed - plain), rel=1e-5)


class Loader:
    """One batch an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """There is but one."""

    def __iter__(self) -> Any:
        return iter([batch()])


def test_without_saq_the_least_loss_decides() -> None:
    module = searching()
    found = prepared(module)
    found._loader = Loader()
    assert found.measure == "loss"
    found.near_budget = lambda generator: [(0,) * 6, (3,) * 6, (1,) * 6]  # type: ignore[method-assign]
    values = found.sharpness(found.near_budget(torch.Generator()))
    found.end(torch.Generator())
    assert found.present == found.near_budget(torch.Generator())[values.index(min(values))]
    assert bool(found.state.over)


def test_the_policy_learns_behind_the_epochs_between_warm_up_and_end() -> None:
    module = searching(warmup=0.3, until=0.9, lr=1e-2)
    start = {name: value.clone() for name, value in mechanic(module).policy.state_dict().items()}
    learned: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, host: Any, *arguments: Any) -> None:
            learned.append(mechanic(host).learner.updates)

    trainer = fit(module, max_epochs=4, callbacks=(Count(),))
    assert learned == [0] * 8 + [2] * 4 + [4] * 4
    assert not torch.equal(mechanic(module).policy.head.bias, start["head.bias"])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"samq/objective", "samq/loss", "samq/cost", "samq/entropy"} <= logged.keys()
    assert logged["samq/entropy"] < 6 * math.log(4)
    widths = Allocation.of(module.net).metrics()
    assert {name: logged[name] for name in widths} == widths


def test_the_policy_finds_the_budget() -> None:
    module = searching(budget={**THREE, "value": 2.5}, baseline=0.9, lr=0.01, beta=0.0)
    found = prepared(module)
    found.losses = lambda batch: (torch.tensor(1.0), torch.tensor(1.0))  # type: ignore[method-assign]
    start = [found.cost(picks) for picks in found.policy.sample(torch.Generator().manual_seed(1), 50).tolist()]
    assert sum(start) / len(start) == pytest.approx(3.5, abs=0.2)
    generator = torch.Generator().manual_seed(0)
    seen = [found.train_policy(iter([batch()] * 50), generator) for _ in range(4)]
    assert seen[-1]["cost"] == pytest.approx(2.5, abs=0.2)
    assert seen[-1]["objective"] < 0.6 * seen[0]["objective"] < 0.6 * (1 + 45 * (3.5 / 2.5 - 1) ** 2)


@pytest.mark.parametrize(
    ("value", "candidates", "tolerance", "warned"),
    [(2.0, 3, 0.5, True), (4.0, 3, 0.5, False), (3.51, 3, 1e-4, True)],
    ids=["too few in all", "enough", "too few close"],
)
def test_too_few_configurations_close_below_the_budget_are_warned_of(
    value: float, candidates: int, tolerance: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = prepared(searching(budget={**THREE, "value": value}, candidates=candidates, tolerance=tolerance))
    drawn = found.near_budget(torch.Generator().manual_seed(0))
    assert all(found.cost(picks) <= value for picks in drawn)
    assert ("callbacks.samq: 50 draws have fewer than" in caplog.text) == warned


# -- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [THREE, BOPS], ids=["average_bits", "bops"])
def test_at_its_end_the_search_is_within_the_budget(budget: dict[str, Any]) -> None:
    module, watch = searching(budget=budget, until=0.5), Watch()
    fit(module, callbacks=(watch,))
    found = mechanic(module)
    assert len(set(watch.widths[4:])) == 1 and len(set(watch.widths[:4])) == 4
    assert all(found.within(each) for each in watch.widths[4:])
    assert all((each["conv1"], each["fc"]) == ((8, 8), (8, 8)) for each in watch.widths)
    assert found.cost(found.present) >= 0.8 * found.budget.value
    net = finalise(module)["final"]
    images = torch.randn(4, 3, 8, 8)
    assert Allocation.of(net) == watch.widths[-1]
    torch.testing.assert_close(net(images), module.eval().net(images))
    rebuilt = finalise(searching(budget=budget))["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert Allocation.of(rebuilt) == watch.widths[-1] and torch.equal(rebuilt(images), net(images))


def test_a_crash_between_two_policy_epochs_leaves_no_trace(tmp_path: Path) -> None:
    options = {"until": 0.9, "warmup": 0.0, "lr": 0.05, "baseline": 0.9}
    whole, watch = searching(**options), Watch()
    fit(whole, folder=tmp_path / "whole", callbacks=(watch,))
    with pytest.raises(RuntimeError, match="stopped"):
        fit(searching(**options), folder=tmp_path / "parts", callbacks=(StopAt(5),))
    pl.seed_everything(99, verbose=False)
    resumed, later = searching(**options), Watch()
    last = tmp_path / "parts/checkpoints/last.ckpt"
    fit(resumed, folder=tmp_path / "parts", resume=last, callbacks=(later,))
    assert 0 < len(later.widths) < len(watch.widths)
    assert watch.widths[-len(later.widths) :] == later.widths
    assert [name for name, value in state(whole).items() if not torch.equal(value, state(resumed)[name])] == []
    one, other = (mechanic(each).policy.state_dict() for each in (whole, resumed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, _ = allocation_left(module, tmp_path)
    assert left == Allocation.of(module.net)


def test_the_widths_of_a_table_are_those_that_forward_uses() -> None:  # pitfall: the official fine-tuning ignores them
    slots = {"weight": {"name": "lsq", "bits": 2}, "input": None, "output": None}
    module = make_module(quantizer={"table": {"conv1": slots, "fc": slots}})
    calibrate(module.net, [batch()[0]])
    for layer in (module.net.conv1, module.net.fc):
        assert 2 < len(layer.quantized_weight().unique()) <= 4
