"""``compile=network`` with every mechanic and every quantizer: the eager result, and no new graph after two steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from research.learning.module import QuantModule
from research.models.structure import FloatModel
from research.quant.quantizers import REGISTRY
from tests.conformance.registry import FIRST, MECHANICS, measured, recipe
from tests.learning.tiny import LSQ, fit, float_weights, make_module, state, tiny_net

MODEL = tiny_net()
STEPS = 4


class Watch(pl.Callback):
    """Keeps the state of the network after the first step of the last epoch, and the graphs after every step."""

    def __init__(self, counter: Any = None) -> None:
        self.counter = counter
        self.graphs: list[int] = []
        self.first: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.first = self.first or state(module.net)
        if self.counter is not None:
            self.graphs.append(self.counter.frame_count)


def train(watch: Watch, epochs: int = 1, **settings: Any) -> QuantModule:
    module = make_module(**{"model": MODEL, **settings})
    trainer = fit(
        module, max_epochs=epochs, limit_train_batches=STEPS // epochs, limit_val_batches=0, callbacks=(watch,)
    )
    assert trainer.global_step == STEPS
    return module


def compile_with(counter: Any) -> Callable[..., None]:
    """``net.compile`` with another backend; the options are those of the real compiler."""
    return lambda net, **options: nn.Module.compile(net, backend=counter)


def check(backend: str, monkeypatch: pytest.MonkeyPatch, epochs: int = 1, **settings: Any) -> None:
    """Train eager and compiled; the eager backend runs the traced graphs, aot_eager traces their backward too."""
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(FloatModel, "compile", compile_with(counter), raising=False)
    eager, compiled = Watch(), Watch(counter)
    train(eager, epochs, **settings)
    train(compiled, epochs, **settings, compile="network")
    assert compiled.graphs[0] > 0, "nothing was compiled"
    assert len(set(compiled.graphs[1:])) == 1, f"graphs after each step: {compiled.graphs}"
    assert dict(counters["graph_break"]) == {}
    assert epochs == 1 or measured(compiled.first), "no curvature was measured"
    for key, value in eager.first.items():
        torch.testing.assert_close(compiled.first[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_weights(tmp_path_factory.mktemp("float") / "tiny.safetensors", MODEL)


@pytest.mark.parametrize("name", MECHANICS)
def test_a_mechanic_keeps_its_graphs_or_is_refused(name: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MECHANICS[name]
    if case.build().needs_double_backward:
        with pytest.raises(ValueError, match=rf"^compile=network: callbacks.{case.slug} [^\n]*; use compile=none$"):
            make_module(**case.settings, compile="network")
        return
    backend = "aot_eager" if case is FIRST[case.slug] else "eager"
    check(backend, monkeypatch, case.epochs, **case.settings, checkpoint=weights)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_quantizer_keeps_its_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check("eager", monkeypatch, quantizer=recipe(name))


@pytest.mark.slow
def test_the_real_compiler_trains_two_evaluations_a_step(tmp_path: Path) -> None:
    torch.compiler.reset()
    bare = tiny_net(batchnorm=False)  # few kernels: each is a call of the C++ compiler
    settings: dict[str, Any] = {**FIRST["sam"].settings, "model": bare, "quantizer": {"weight": LSQ["weight"]}}
    settings["checkpoint"] = float_weights(tmp_path / "float.safetensors", bare)
    eager, compiled = Watch(), Watch()
    train(eager, **settings)
    train(compiled, **settings, compile="network")
    for key, value in eager.first.items():
        torch.testing.assert_close(compiled.first[key], value)
