"""What every quantizer has to keep inside the host: training, resume, restore, precision.

Its formulas, its second derivatives and its compiled form alone are in ``tests/quant``; compiled in the host, in
``test_compile.py``.
"""

from pathlib import Path

import pytest
import torch

from research.learning.module import QuantModule
from research.quant.layers import quantizers
from research.quant.quantizers import REGISTRY
from tests.conformance.registry import recipe
from tests.learning.tiny import LAST, RESNET, fit, make_module, resume_differences, state, tiny_net

EVERY_QUANTIZER = pytest.mark.parametrize("name", REGISTRY)


@EVERY_QUANTIZER
def test_a_crash_and_a_resume_leave_no_trace(name: str, tmp_path: Path) -> None:
    assert resume_differences(tmp_path, model=tiny_net(dropout=0.25), quantizer=recipe(name)) == []


@EVERY_QUANTIZER
def test_it_trains_and_a_checkpoint_alone_restores_it(name: str, tmp_path: Path) -> None:
    module = make_module(model=RESNET, quantizer=recipe(name))
    start = state(module.net)
    fit(module, max_epochs=1, limit_train_batches=2, folder=tmp_path)
    trained = state(module.net)
    used = {quantizer.spec.name for _, quantizer in quantizers(module.net)}
    assert used == {name}
    restored = QuantModule.load_from_checkpoint(tmp_path / LAST)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored.eval()(images), module.eval()(images))
    saved = state(restored.net)
    assert [key for key, value in trained.items() if not torch.equal(value, saved[key])] == []
    # a scale in front of a batch-norm has a gradient of rounding noise, which need not move it in two steps
    restored.train().objective((images, torch.arange(4))).loss.backward()
    still = [key for key, _ in module.net.named_parameters() if torch.equal(trained[key], start[key])]
    gradients = {key: p.grad for key, p in restored.net.named_parameters() if p.grad is not None}
    assert [key for key in still if key not in gradients or not gradients[key].any()] == [], "every parameter learns"


@EVERY_QUANTIZER
def test_it_trains_in_bf16(name: str) -> None:
    module = make_module(quantizer=recipe(name), precision="bf16")
    start = state(module.net)
    fit(module, max_epochs=1, limit_train_batches=2, precision="bf16-mixed")
    trained = dict(module.net.named_parameters())
    assert [key for key, value in trained.items() if torch.equal(value, start[key])] == []
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in trained.values())
