"""What every quantizer has to keep inside the host: training, resume, restore."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from research.learning.module import QuantModule
from research.quant.layers import quantizers
from research.quant.quantizers import REGISTRY
from tests.conformance.registry import CONF
from tests.learning.tiny import LAST, RESNET, fit, make_module, resume_differences, state

BITS = 4


def recipe(name: str) -> dict[str, Any]:
    """The quantizer's own file, at one width everywhere."""
    text = (CONF / f"quantizer/{name}.yaml").read_text().replace("${quantizer.bits}", str(BITS))
    config: dict[str, Any] = yaml.safe_load(text)
    return {**config, "rules": []}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_crash_and_a_resume_leave_no_trace(name: str, tmp_path: Path) -> None:
    assert resume_differences(tmp_path, model=RESNET, quantizer=recipe(name)) == []


@pytest.mark.parametrize("name", REGISTRY)
def test_it_trains_and_a_checkpoint_alone_restores_it(name: str, tmp_path: Path) -> None:
    module = make_module(model=RESNET, quantizer=recipe(name))
    start = state(module.net)
    fit(module, max_epochs=1, limit_train_batches=2, folder=tmp_path)
    trained = state(module.net)
    used = {quantizer.spec.name for _, quantizer in quantizers(module.net)}
    assert used == {name}
    moved = [key for key, p in module.net.named_parameters() if not torch.equal(trained[key], start[key])]
    assert moved == [key for key, _ in module.net.named_parameters()], "every parameter learns"
    restored = QuantModule.load_from_checkpoint(tmp_path / LAST)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored.eval()(images), module.eval()(images))
    saved = state(restored.net)
    assert [key for key, value in trained.items() if not torch.equal(value, saved[key])] == []
