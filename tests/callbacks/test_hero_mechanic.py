"""HERO as a mechanic: passes, statistics, noise, warm-up, what is penalised, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.hero import HERO
from tests.callbacks.test_hero import host, images
from tests.learning.tiny import CLASSES, LSQ, fit, make_module, tiny_net


def test_without_a_penalty_no_second_order_graph_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    grad = torch.autograd.grad

    def spy(*arguments: Any, create_graph: bool = False, **options: Any) -> Any:
        asked.append(create_graph)
        return grad(*arguments, create_graph=create_graph, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    model = tiny_net(batchnorm=False)
    for strength, warmup, expected in ((0.0, 0, [False]), (5.0, 1, [False]), (5.0, 0, [False, True])):
        asked.clear()
        host(model, strength=strength, warmup_epochs=warmup).objective(images())
        assert asked == expected
    asked.clear()
    host(model, radius=0.0).objective(images())
    assert asked == []


def test_the_penalty_starts_after_the_warmup() -> None:
    module = host(tiny_net(batchnorm=False), warmup_epochs=2)
    found = []
    for epoch in range(4):
        module.progress.epoch = epoch
        found.append(bool(module.objective(images()).terms["hero"] > 0))
    assert found == [False, False, True, True]


def test_the_two_rules_differ_in_a_shortcut_norm_and_in_quantizers() -> None:
    resnet = {"_target_": "research.models.resnet8", "num_classes": CLASSES, "width": 4, "shortcut": "B"}
    settings: dict[str, Any] = {"model": resnet, "quantizer": LSQ}
    found = {}
    for tensors in ("modules", "names"):
        module = make_module({"hero": {"_target_": "callbacks.hero.HERO", "tensors": tensors}}, **settings)
        (hero,) = module.active
        assert isinstance(hero, HERO)
        found[tensors] = hero.penalised
    weights = {
        f"{name}.weight" for name, layer in module.net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    assert found["modules"] == weights
    surplus = found["names"] - weights
    assert weights < found["names"]
    assert {"conv1.weight_quantizer.raw_scale", "layer2.0.downsample.1.weight"} <= surplus
    assert all("bias" not in name and "bn" not in name for name in surplus)


@pytest.mark.parametrize(("statistics", "updates"), [("counted", 1), ("all", 2)])
def test_statistics_count_one_pass_or_all(statistics: str, updates: int) -> None:
    hero = {"hero": {"_target_": "callbacks.hero.HERO", "statistics": statistics, "warmup_epochs": 0}}
    module = make_module(hero, quantizer={}, model=tiny_net())
    batch = (torch.randn(8, 3, 8, 8), torch.arange(8) % CLASSES)
    module.objective(batch).loss.backward()
    assert int(module.net.bn1.num_batches_tracked) == updates
    plain = make_module(quantizer={}, model=tiny_net())
    plain.objective(batch)
    assert torch.equal(module.net.bn1.running_mean, plain.net.bn1.running_mean) == (statistics == "counted")


def test_both_passes_see_one_noise() -> None:
    module = host(tiny_net(batchnorm=False, dropout=0.5), warmup_epochs=0)
    masks: list[Tensor] = []
    module.net.dropout.register_forward_hook(lambda layer, inputs, output: masks.append(output == 0))
    module.objective(images())
    assert len(masks) == 2 and torch.equal(masks[0], masks[1])


def test_on_a_quantized_network_the_penalty_goes_through_the_surrogate() -> None:
    hero = {"hero": {"_target_": "callbacks.hero.HERO", "warmup_epochs": 0}}
    module = make_module(hero, quantizer=LSQ, model=tiny_net())
    fit(module, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    module.train()
    evaluation = module.objective((torch.rand(8, 3, 8, 8), torch.arange(8) % CLASSES))
    weight = module.net.conv1.weight
    (slope,) = torch.autograd.grad(evaluation.terms["hero"], weight)
    assert bool(evaluation.terms["hero"] > 0)
    assert bool(slope.isfinite().all()) and float(slope.abs().sum()) > 0


def test_a_quantizer_without_a_second_derivative_is_refused() -> None:
    ewgs = {"weight": {"name": "ewgs", "bits": 4, "signed": True}}
    with pytest.raises(ValueError, match=r"callbacks\.hero: .* conv1\.weight_quantizer \(EWGS\).*such as plain lsq"):
        make_module({"hero": {"_target_": "callbacks.hero.HERO"}}, quantizer=ewgs)


def test_a_network_with_nothing_to_penalise_is_refused() -> None:
    module = make_module(quantizer={})
    module.net.requires_grad_(False)
    for tensors in ("modules", "names"):
        with pytest.raises(ValueError, match=f"hero.tensors={tensors}: no trained parameter"):
            HERO(tensors=tensors).attach(module)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": -1}, "hero.radius=-1: use 0 or more"),
        ({"strength": -1}, "hero.strength=-1: use 0 or more"),
        ({"warmup_epochs": -1}, "hero.warmup_epochs=-1: use 0 or more"),
        ({"penalty": "l2"}, "hero.penalty=l2: use mean_square or norm"),
        ({"tensors": "all"}, "hero.tensors=all: use modules or names"),
        ({"statistics": "x"}, "hero.statistics=x: use counted or all"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HERO(**settings)
