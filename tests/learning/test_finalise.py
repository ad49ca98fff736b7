"""Finalising: copies, exact and repeatable; the host stays as it is."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from research.learning.finalise import finalise, measure
from research.learning.mechanic import Mechanic
from tests.learning.tiny import fit, make_data, make_module, state


class Snapping(Mechanic):
    """Snaps the classifier's weights to halves."""

    slug = "snapping"

    def finalise(self, net: nn.Module) -> None:
        with torch.no_grad():
            net.fc.weight.copy_((net.fc.weight * 2).round() / 2)  # type: ignore[union-attr, operator]


class Splitting(Mechanic):
    """One deployment without and one with biases; before or after ``snapping`` in order, by its stage."""

    slug = "splitting"

    def __init__(self, stage: str = "outer") -> None:
        self.stage = stage  # type: ignore[assignment]

    def finalise(self, net: nn.Module) -> Mapping[str, nn.Module]:
        bare = copy.deepcopy(net)
        nn.init.zeros_(bare.fc.bias)  # type: ignore[union-attr, arg-type]
        return {"whole": net, "bare": bare}


class SplittingAgain(Splitting):
    slug = "splitting_again"


def target(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"tests.learning.test_finalise.{name}", **options}


def test_the_host_is_bitwise_unchanged_and_the_copy_is_ready() -> None:
    module = make_module({"snapping": target("Snapping")})
    fit(module, max_epochs=1)
    before, training = state(module), module.training
    batches = [images for images, _ in make_data().calibration_batches(2, 8)]
    net = finalise(module, batches)["final"]
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    assert module.training == training
    assert not net.training
    assert torch.equal(net.fc.weight * 2, (net.fc.weight * 2).round())
    assert not torch.equal(net.fc.weight, module.net.fc.weight)
    assert not torch.equal(net.bn1.running_mean, module.net.bn1.running_mean), "statistics were estimated anew"


def test_finalising_twice_gives_the_same_bits() -> None:
    module = make_module({"snapping": target("Snapping")})
    fit(module, max_epochs=1)
    once, again = state(finalise(module)["final"]), state(finalise(module)["final"])
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert torch.equal(once["bn1.running_mean"], module.net.bn1.running_mean), "no batches: statistics as trained"


@pytest.mark.parametrize("stage", ["inner", "outer"])
def test_every_mechanic_acts_on_every_deployment(stage: str) -> None:
    module = make_module({"snapping": target("Snapping"), "splitting": target("Splitting", stage=stage)})
    fit(module, max_epochs=1)
    deployments = finalise(module)
    assert list(deployments) == ["whole", "bare"]
    assert deployments["whole"].fc.bias.abs().sum() > 0
    assert deployments["bare"].fc.bias.abs().sum() == 0
    for net in deployments.values():
        assert torch.equal(net.fc.weight * 2, (net.fc.weight * 2).round())
        assert not net.training


def test_two_makers_of_deployments_are_refused() -> None:
    module = make_module({"splitting": target("Splitting"), "splitting_again": target("SplittingAgain")})
    with pytest.raises(ValueError, match="callbacks.splitting and callbacks.splitting_again both make deployments"):
        finalise(module)


def test_measure_weighs_every_sample_alike_and_moves_nothing() -> None:
    module = make_module()
    fit(module, max_epochs=1)
    net = finalise(module)["final"]
    before = state(net)
    images, labels = next(iter(make_data().test_dataloader()))
    measured = measure(net, module.task, [(images[:5], labels[:5]), (images[5:], labels[5:])])
    with torch.no_grad():
        logits = net(images)
    assert measured["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
