"""Parameter groups, several optimizers as one, schedules."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from research.learning.mechanic import Mechanic, ParameterGroup
from research.learning.optim import Composite, Schedule, build_optimizer, build_scheduler, default_groups
from tests.learning.tiny import LSQ, make_module
from tests.learning.tiny import SGD as SGD_CONFIG


class Claimant(Mechanic):
    slug = "claimant"

    def __init__(self, parameters: list[nn.Parameter], **group: Any) -> None:
        self.group = ParameterGroup(parameters, **group)

    def parameter_groups(self, module: Any) -> list[ParameterGroup]:
        return [self.group]


class SecondClaimant(Claimant):
    slug = "second"


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]


def composite(one: nn.Parameter, other: nn.Parameter) -> Composite:
    return Composite([SGD([one], lr=0.01, momentum=0.9), Adam([other], lr=0.01)])


def step(optimizer: Optimizer, one: nn.Parameter, other: nn.Parameter) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (one.square().sum() - 1) ** 2 + (other - 1).square().sum() * one.sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_a_composite_equals_its_parts_run_by_hand() -> None:
    one, other = parameters()
    together = composite(one, other)
    for _ in range(5):
        step(together, one, other)
    a, b = parameters()
    sgd, adam = SGD([a], lr=0.01, momentum=0.9), Adam([b], lr=0.01)
    for _ in range(5):
        sgd.zero_grad()
        adam.zero_grad()
        ((a.square().sum() - 1) ** 2 + (b - 1).square().sum() * a.sum()).backward()
        sgd.step()
        adam.step()
    assert torch.equal(one, a)
    assert torch.equal(other, b)


def test_a_composite_goes_on_bit_for_bit_from_its_state() -> None:
    one, other = parameters()
    optimizer = composite(one, other)
    for _ in range(3):
        step(optimizer, one, other)
    saved = copy.deepcopy(optimizer.state_dict())
    a, b = nn.Parameter(one.detach().clone()), nn.Parameter(other.detach().clone())
    restored = composite(a, b)
    restored.load_state_dict(saved)
    assert restored.param_groups[0] is restored.optimizers[0].param_groups[0], "a schedule must reach the real groups"
    for _ in range(3):
        step(optimizer, one, other)
        step(restored, a, b)
    assert torch.equal(one, a)
    assert torch.equal(other, b)


def test_a_schedule_reaches_all_groups_of_a_composite_before_and_after_a_restore() -> None:
    one, other = parameters()
    optimizer = composite(one, other)
    schedule = build_scheduler(optimizer, {"name": "linear"}, total=4)
    step(optimizer, one, other)
    schedule.step()
    assert [o.param_groups[0]["lr"] for o in optimizer.optimizers] == [0.01 * 0.75] * 2
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, one, other)
    schedule.step()
    assert [o.param_groups[0]["lr"] for o in optimizer.optimizers] == [0.01 * 0.5] * 2


def named(module: Any, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The group of every parameter by the parameter's name."""
    names = {parameter: name for name, parameter in module.net.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def test_weights_norms_and_scales_get_their_own_options() -> None:
    module = make_module(quantizer=LSQ)
    config = {**SGD_CONFIG, "weight_decay": 0.5, "quantizer": {"lr_factor": 0.1, "weight_decay": 0.25}}
    group = named(module, build_optimizer(module.net, config, [], module))
    assert set(group) == {name for name, _ in module.net.named_parameters()}
    assert (group["conv1.weight"]["lr"], group["conv1.weight"]["weight_decay"]) == (0.1, 0.5)
    assert (group["bn1.weight"]["lr"], group["bn1.weight"]["weight_decay"]) == (0.1, 0.0)
    assert group["fc.bias"]["weight_decay"] == 0.0
    scale = group["conv1.weight_quantizer.raw_scale"]
    assert (scale["lr"], scale["weight_decay"]) == (pytest.approx(0.01), 0.0), "LSQ's own word wins over the config"


def test_the_clip_of_pact_is_decayed_and_the_step_of_lsq_is_not() -> None:
    recipe = {"weight": LSQ["weight"], "input": {"name": "pact", "bits": 4}}
    module = make_module(quantizer=recipe)
    group = named(module, build_optimizer(module.net, {**SGD_CONFIG, "weight_decay": 0.5}, [], module))
    assert group["conv1.input_quantizer.alpha"]["weight_decay"] == 0.5
    assert group["conv1.weight_quantizer.raw_scale"]["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out_and_empty_groups_too() -> None:
    module = make_module(quantizer={})
    module.net.conv1.weight.requires_grad_(False)
    for parameter in module.net.parameters():
        if parameter.ndim == 1:
            parameter.requires_grad_(False)
    groups = default_groups(module.net, SGD_CONFIG)
    assert [group["name"] for group in groups] == ["weight"]
    assert [p is module.net.fc.weight for p in groups[0]["params"]] == [True]


def test_a_claimed_parameter_leaves_its_default_group() -> None:
    module = make_module(quantizer={})
    weight = module.net.conv1.weight
    claimant = Claimant([weight], options={"lr_factor": 0.5, "weight_decay": 0.0})
    optimizer = build_optimizer(module.net, SGD_CONFIG, [claimant], module)
    assert isinstance(optimizer, SGD)
    owners = [group for group in optimizer.param_groups if any(p is weight for p in group["params"])]
    assert [group["name"] for group in owners] == ["claimant"]
    assert (owners[0]["lr"], owners[0]["weight_decay"], owners[0]["momentum"]) == (0.05, 0.0, 0.9)


def test_a_group_with_its_own_optimizer_makes_a_composite() -> None:
    module = make_module(quantizer={})
    own = nn.Parameter(torch.zeros(2))
    claimant = Claimant([own, module.net.fc.weight], optimizer={"_target_": "torch.optim.Adam", "lr": 0.5})
    optimizer = build_optimizer(module.net, SGD_CONFIG, [claimant], module)
    assert isinstance(optimizer, Composite)
    assert [type(part) for part in optimizer.optimizers] == [SGD, Adam]
    adam = optimizer.optimizers[1].param_groups[0]
    assert adam["lr"] == 0.5
    assert [p is q for p, q in zip(adam["params"], [own, module.net.fc.weight], strict=True)] == [True, True]
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(module.net.parameters())) + 1


def test_two_claimants_of_one_parameter_are_refused() -> None:
    module = make_module(quantizer={})
    weight = [module.net.conv1.weight]
    with pytest.raises(ValueError, match="callbacks.second and callbacks.claimant both want to optimise"):
        build_optimizer(module.net, SGD_CONFIG, [Claimant(weight), SecondClaimant(weight)], module)


@pytest.mark.parametrize(
    ("settings", "step", "factor"),
    [
        ({"name": "constant"}, 7, 1.0),
        ({"name": "cosine"}, 0, 1.0),
        ({"name": "cosine"}, 5, 0.5 * (1 + math.cos(math.pi * 0.05))),
        ({"name": "cosine", "final": 0.1}, 50, 0.55),
        ({"name": "cosine", "final": 0.1}, 100, 0.1),
        ({"name": "cosine"}, 130, 0.0),
        ({"name": "linear", "final": 0.2}, 25, 0.8),
        ({"name": "linear"}, 100, 0.0),
        ({"name": "step"}, 49, 1.0),
        ({"name": "step"}, 50, 0.1),
        ({"name": "step", "milestones": [0.3], "gamma": 0.5}, 99, 0.5),
        ({"name": "constant", "warmup": 0.1}, 0, 1 / 11),
        ({"name": "constant", "warmup": 0.1}, 9, 10 / 11),
        ({"name": "cosine", "warmup": 0.1}, 10, 1.0),
        ({"name": "linear", "warmup": 0.5}, 75, 0.5),
    ],
)
def test_schedules(settings: dict[str, Any], step: int, factor: float) -> None:
    assert Schedule(total=100, **settings)(step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "scheduler.name='cosin': use one of cosine"),
        ({"name": "cosine", "warmup": 1.0}, "scheduler.warmup=1.0: use a fraction"),
        ({"name": "step", "milestones": [30, 60]}, r"scheduler.milestones=\[30, 60\]: use fractions of the run"),
        ({"name": "cosine", "final": -1.0}, "scheduler.final=-1.0: use 0 or more"),
        ({"name": "cosine", "warm": 0.1}, "scheduler=.*warm"),
    ],
)
def test_bad_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scheduler(SGD(parameters(), lr=0.1), settings, total=10)
