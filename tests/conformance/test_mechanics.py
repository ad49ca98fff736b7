"""What every mechanic has to keep: resume, restore, off switch, precision, finalising, several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from research.config import build_module, plain
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from tests.conformance.ddp import MODEL as BARE
from tests.conformance.ddp import train
from tests.conformance.registry import CONF, DECLARED, FIRST, MECHANICS
from tests.learning.tiny import (
    LAST,
    RESNET,
    fit,
    float_weights,
    make_data,
    make_module,
    resume_differences,
    state,
    tiny_net,
)

ROOT = CONF.parent
EVERY_CASE = pytest.mark.parametrize("name", MECHANICS)
EVERY_MECHANIC = pytest.mark.parametrize("slug", FIRST)


def test_the_registry_declares_only_what_exists() -> None:
    assert set(FIRST) == {path.stem for path in (CONF / "callbacks").glob("*.yaml")}
    assert set(DECLARED) <= set(FIRST)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_weights(tmp_path_factory.mktemp("float") / "resnet.safetensors", RESNET)


@EVERY_CASE
def test_a_crash_and_a_resume_leave_no_trace(name: str, weights: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mechanics": MECHANICS[name].mechanics, "model": RESNET, "checkpoint": weights}
    assert resume_differences(tmp_path, **settings) == []


@EVERY_CASE
def test_it_trains_and_a_checkpoint_alone_restores_it(name: str, weights: Path, tmp_path: Path) -> None:
    module = make_module(MECHANICS[name].mechanics, model=RESNET, checkpoint=weights)
    start = state(module.net)
    fit(module, max_epochs=1, limit_train_batches=2, folder=tmp_path)
    assert not torch.equal(module.net.conv1.weight, start["conv1.weight"])
    restored = QuantModule.load_from_checkpoint(tmp_path / LAST)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored.eval()(images), module.eval()(images))
    assert restored.describe() == module.describe()
    assert state(restored).keys() == state(module).keys()


@EVERY_MECHANIC
def test_disabled_equals_absent(slug: str, tmp_path: Path) -> None:
    case = FIRST[slug]
    if case.declared.off is None:
        pytest.skip(f"{slug} has no strength that could be 0")
    model = tiny_net(dropout=0.25)
    settings: dict[str, Any] = {"model": model, "checkpoint": float_weights(tmp_path / "f.safetensors", model)}
    trained = []
    for mechanics in ({}, case.with_settings(case.declared.off), case.mechanics):
        module = make_module(mechanics, **settings)
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    absent, disabled, on = trained
    assert [name for name, value in disabled.items() if not torch.equal(value, absent[name])] == []
    assert not torch.equal(on["conv1.weight"], absent["conv1.weight"]), "the mechanic does something when it is on"


@EVERY_CASE
def test_every_precision_it_allows_runs(name: str, weights: Path) -> None:
    case = MECHANICS[name]
    for precision in case.build().precisions:
        module = make_module(case.mechanics, model=RESNET, checkpoint=weights, precision=precision)
        trainer = fit(
            module, max_epochs=1, limit_train_batches=2, precision={"32": "32-true", "bf16": "bf16-mixed"}[precision]
        )
        assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
        assert all(bool(p.isfinite().all()) for p in module.parameters())


@EVERY_CASE
def test_finalise_is_pure_and_idempotent(name: str, weights: Path) -> None:
    module = make_module(MECHANICS[name].mechanics, model=RESNET, checkpoint=weights)
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
        with pytest.raises(ValueError, match=slug):
            make_module(case.mechanics, quantizer={})
    else:
        assert make_module(case.mechanics, quantizer={}).active[0].slug == slug


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what they trained with every case."""
    folder = tmp_path_factory.mktemp("ddp")
    float_weights(folder / "float.safetensors", BARE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.ddp", str(folder)],
            cwd=ROOT,
            env={**os.environ, **common, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@EVERY_CASE
def test_two_processes_agree_and_an_exact_mechanic_equals_one(name: str, two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    alone = train(name, two_processes / "float.safetensors")
    assert torch.equal(alone["mechanics.drawing.drawn"], first["mechanics.drawing.drawn"])
    assert int((first["mechanics.drawing.drawn"] > 0).sum()) == 4
    if MECHANICS[name].build().ddp == "exact":
        for key, value in alone.items():
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6, msg=key)


PLUGIN = """
from research.learning.mechanic import Mechanic


class Pull(Mechanic):
    slug = "pull"

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def loss_terms(self, evaluation):
        return {"pull": self.strength * evaluation.outputs.square().mean()}
"""


def test_a_mechanic_from_another_folder_is_chosen_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_ideas.py").write_text(PLUGIN)
    (tmp_path / "conf/callbacks").mkdir(parents=True)
    (tmp_path / "conf/callbacks/pull.yaml").write_text("pull:\n  _target_: my_ideas.Pull\n  strength: 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "callbacks=[pull,sam]"]
    overrides += [
        "callbacks.pull.strength=2.0",
        "data=synthetic",
        "model.width=4",
        "data.image_size=8",
        "data.num_classes=4",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plain(compose("train", overrides=overrides))
    module = build_module(config)
    assert [mechanic.slug for mechanic in module.active] == ["pull", "sam"]
    trainer = fit(module, make_data(), max_epochs=1, limit_train_batches=2)
    assert trainer.global_step == 2
    logged = trainer.callback_metrics
    assert float(logged["train/step/pull"]) > 0
    with pytest.raises(ValueError, match="my_ideas.Pull is refused"):
        build_module(config, trusted=False)
