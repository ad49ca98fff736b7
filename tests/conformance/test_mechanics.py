"""What every mechanic has to keep in one process: resume, restore, off switch, precision, finalising."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.settings import PRECISIONS
from tests.conformance.registry import FIRST, MECHANICS
from tests.learning.tiny import LAST, RESNET, fit, float_weights, make_module, resume_differences, state, tiny_net

NOISY = tiny_net(dropout=0.25)
EVERY_CASE = pytest.mark.parametrize("name", MECHANICS)
EVERY_MECHANIC = pytest.mark.parametrize("slug", FIRST)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float weights of the residual network."""
    return float_weights(tmp_path_factory.mktemp("float") / "resnet.safetensors", RESNET)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float weights of the network with dropout."""
    return float_weights(tmp_path_factory.mktemp("float") / "noisy.safetensors", NOISY)


@EVERY_CASE
def test_a_crash_and_a_resume_leave_no_trace(name: str, noisy: Path, tmp_path: Path) -> None:
    assert resume_differences(tmp_path, **MECHANICS[name].settings, model=NOISY, checkpoint=noisy) == []


@EVERY_CASE
def test_it_trains_and_a_checkpoint_alone_restores_it(name: str, weights: Path, tmp_path: Path) -> None:
    module = make_module(**MECHANICS[name].settings, model=RESNET, checkpoint=weights)
    start = state(module.net)
    fit(module, max_epochs=1, limit_train_batches=2, folder=tmp_path)
    assert not torch.equal(module.net.conv1.weight, start["conv1.weight"])
    restored = QuantModule.load_from_checkpoint(tmp_path / LAST)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored.eval()(images), module.eval()(images))
    assert restored.describe() == module.describe()
    assert state(restored).keys() == state(module).keys()


@EVERY_MECHANIC
def test_disabled_equals_absent(slug: str, noisy: Path) -> None:
    case = FIRST[slug]
    if case.declared.off is None:
        pytest.skip(f"{slug} has no strength that could be 0")
    trained = []
    for mechanics in ({}, case.off, case.mechanics):
        module = make_module(mechanics, quantizer=case.quantizer, model=NOISY, checkpoint=noisy)
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    absent, disabled, on = trained
    assert [name for name, value in absent.items() if not torch.equal(value, disabled[name])] == []
    assert not torch.equal(on["conv1.weight"], absent["conv1.weight"]), "the mechanic does something when it is on"


@EVERY_CASE
def test_the_precisions_it_allows_run_and_the_others_are_refused(name: str, noisy: Path) -> None:
    case = MECHANICS[name]
    for precision, setting in PRECISIONS.items():
        if precision not in case.build().precisions:
            with pytest.raises(ValueError, match=f"^trainer.precision={precision}: callbacks.{case.slug} works in"):
                make_module(**case.settings, precision=precision)
            continue
        module = make_module(**case.settings, model=NOISY, checkpoint=noisy, precision=precision)
        trainer = fit(module, max_epochs=1, limit_train_batches=2, precision=setting)
        assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
        assert all(bool(p.isfinite().all()) for p in module.parameters())


@EVERY_CASE
def test_finalise_is_pure_and_idempotent(name: str, weights: Path) -> None:
    module = make_module(**MECHANICS[name].settings, model=RESNET, checkpoint=weights)
    fit(module, max_epochs=1, limit_train_batches=2)
    before = state(module)
    once, again = finalise(module), finalise(module)
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    assert list(once) == list(again)
    for deployment, net in once.items():
        found, expected = state(net), state(again[deployment])
        module.active[0].finalise(net)
        assert state(net).keys() == found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert all(torch.equal(value, found[name]) for name, value in state(net).items())


@EVERY_MECHANIC
def test_a_net_without_its_layers_is_refused_exactly_if_it_needs_them(slug: str) -> None:
    case = FIRST[slug]
    if case.declared.needs_layers:
        with pytest.raises(ValueError, match=f"callbacks.{slug}"):
            make_module(case.mechanics, quantizer={})
    else:
        assert make_module(case.mechanics, quantizer={}).active[0].slug == slug
