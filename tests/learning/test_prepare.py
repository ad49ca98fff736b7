"""What happens once, before the first step of a fresh run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from research.learning.mechanic import Mechanic
from research.learning.prepare import Preparation, copy_float_state
from research.quant.batchnorm import fold_pairs
from research.quant.layers import quantizers
from tests.learning.tiny import LAST, LSQ, RESNET, StopAt, fit, float_weights, make_module, state

BITS4 = {**LSQ, "bits": 4}


class Preparing(Mechanic):
    """Writes down its preparations, and what it found."""

    slug = "preparing"

    def __init__(self) -> None:
        self.found: list[tuple[bool, int, float]] = []

    def prepare(self, module: Any, loader: Any) -> None:
        calibrated = all(bool(quantizer.initialised) for _, quantizer in quantizers(module.net))
        self.found.append(
            (calibrated, sum(len(labels) for _, labels in loader), float(module.net.fc.weight.detach().sum()))
        )


MECHANIC = {"preparing": {"_target_": "tests.learning.test_prepare.Preparing"}}


def test_mechanics_prepare_once_after_weights_and_ranges_and_never_on_a_resume(tmp_path: Path) -> None:
    checkpoint = float_weights(tmp_path / "float.safetensors", RESNET)
    module = make_module(MECHANIC, model=RESNET, checkpoint=checkpoint)
    expected = float(module.initial_network().fc.weight.detach().sum())
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, folder=tmp_path, callbacks=(StopAt(3),))
    assert module.active[0].found == [(True, 16, expected)]
    resumed = make_module(MECHANIC, model=RESNET, checkpoint=checkpoint)
    fit(resumed, folder=tmp_path, resume=tmp_path / LAST)
    assert resumed.active[0].found == []
    assert bool(resumed.prepared)


def test_post_training_quantization_is_a_run_of_no_epochs(tmp_path: Path) -> None:
    module = make_module(model=RESNET, checkpoint=float_weights(tmp_path / "float.safetensors", RESNET))
    fit(module, max_epochs=0)
    assert all(bool(quantizer.initialised) for _, quantizer in quantizers(module.net))
    assert torch.equal(module.net.fc.weight, module.initial_network().fc.weight)


@pytest.mark.parametrize("fold_bn", ["none", 1, 2, 3, 4])
def test_float_weights_arrive_whole(tmp_path: Path, fold_bn: Any) -> None:
    recipe = {**BITS4, "fold_bn": fold_bn}
    module = make_module(model=RESNET, quantizer=recipe, checkpoint=float_weights(tmp_path / "f.safetensors", RESNET))
    fit(module, max_epochs=0)
    found = state(module.net)
    source = module.initial_network().state_dict()
    assert [name for name, tensor in source.items() if not torch.equal(tensor, found[name])] == []


def test_float_weights_arrive_folded_where_batchnorm_is_folded_for_good(tmp_path: Path) -> None:
    recipe = {**BITS4, "fold_bn": 0}
    module = make_module(model=RESNET, quantizer=recipe, checkpoint=float_weights(tmp_path / "f.safetensors", RESNET))
    fit(module, max_epochs=0)
    source = module.initial_network()
    fold_pairs(source, source.structure().conv_bn)
    found = state(module.net)
    assert [name for name, tensor in source.state_dict().items() if not torch.equal(tensor, found[name])] == []


def test_every_width_gets_the_float_batchnorm(tmp_path: Path) -> None:
    checkpoint = float_weights(tmp_path / "f.safetensors", RESNET)
    module = make_module(model=RESNET, quantizer={**BITS4, "widths": [2, 4]}, checkpoint=checkpoint)
    source = module.initial_network()
    with torch.no_grad():
        source.bn1.running_mean.normal_()
        source.bn1.num_batches_tracked.fill_(9)
    copy_float_state(source, module.net)
    for width in ("2", "4"):
        norm = module.net.bn1.by_width[width]
        assert torch.equal(norm.running_mean, source.bn1.running_mean)
        assert int(norm.num_batches_tracked) == 9
    assert torch.equal(module.net.conv1.weight, source.conv1.weight)


def test_a_missing_tensor_is_named() -> None:
    module = make_module(model=RESNET)
    source = module.float_network()
    source.register_buffer("surplus", torch.zeros(1))
    with pytest.raises(ValueError, match="init_from: the quantized network has no tensor surplus"):
        copy_float_state(source, module.net)


def test_calibration_sees_the_configured_images() -> None:
    trainer = fit(make_module(), max_epochs=0)
    data = Preparation(batches=2, batch_size=4).calibration_data(trainer)
    assert [tuple(images.shape) for images, _ in data] == [(4, 3, 8, 8)] * 2


@pytest.mark.parametrize(("batches", "size"), [(0, 8), (1, 0)])
def test_calibration_without_images_is_refused(batches: int, size: int) -> None:
    with pytest.raises(ValueError, match="calibration=.*use 1 or more of both"):
        Preparation(batches, size)
