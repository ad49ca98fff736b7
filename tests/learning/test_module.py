"""The host: a fit equals a loop written by hand, and a checkpoint alone rebuilds everything."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from research.learning.mechanic import Mechanic
from research.learning.module import QuantModule
from research.quant.calibrate import calibrate
from tests.learning.tiny import (
    FLOAT,
    LAST,
    LSQ,
    RESNET,
    SGD,
    fit,
    float_weights,
    make_data,
    make_module,
    state,
    tiny_net,
)

EPOCHS, ACCUMULATE, CLIP = 3, 2, 0.5


def train_by_hand(module: QuantModule) -> None:
    """SGD with momentum, cosine schedule, accumulation and clipping, in plain PyTorch."""
    data = make_data()
    loader = data.train_dataloader()
    net = module.net
    calibrate(net, [images for images, _ in data.calibration_batches(1, 16)])
    scales = [p for name, p in net.named_parameters() if "raw_scale" in name]
    weights = [p for name, p in net.named_parameters() if p.ndim > 1]
    norms = [p for name, p in net.named_parameters() if p.ndim == 1]
    base = [0.1, 0.1, 0.1 * 0.1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": 1e-3},
        {"params": norms, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    total, step = EPOCHS * len(loader) // ACCUMULATE, 0
    net.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for index, (images, labels) in enumerate(loader):
            loss = nn.functional.cross_entropy(net(images), labels)
            (loss / ACCUMULATE).backward()
            if index % ACCUMULATE == ACCUMULATE - 1:
                for group, lr in zip(optimizer.param_groups, base, strict=False):
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
                nn.utils.clip_grad_norm_([*weights, *norms, *scales], CLIP)
                optimizer.step()
                optimizer.zero_grad()
                step += 1


@pytest.mark.parametrize("quantizer", [FLOAT, LSQ], ids=["plain", "quantized"])
def test_a_fit_equals_a_loop_written_by_hand(quantizer: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"quantizer": quantizer, "model": tiny_net(dropout=0.25)}
    host = make_module(**settings)
    trainer = fit(host, max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP)
    assert trainer.global_step == 6
    reference = make_module(**settings)
    start = state(reference.net)
    train_by_hand(reference)
    expected = state(reference.net)
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())
    assert [name for name, value in state(host.net).items() if not torch.equal(value, expected[name])] == []


class Witness(Mechanic):
    """Writes down where the run stands at each step."""

    slug = "witness"

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def wrap_objective(self, objective: Any) -> Any:
        def watched(batch: Any, state: Any = None) -> Any:
            self.seen.append(("objective", self.module.progress.step, self.module.progress.epoch))
            return objective(batch, state)

        return watched

    def after_step(self, module: QuantModule) -> None:
        self.seen.append(("after", module.progress.step, module.progress.epoch))


def test_progress_counts_real_optimizer_steps() -> None:
    module = make_module({"witness": {"_target_": "tests.learning.test_module.Witness"}}, quantizer=FLOAT)
    fit(module, max_epochs=2, accumulate_grad_batches=2, limit_train_batches=2)
    assert module.active[0].seen == [
        *[("objective", 0, 0), ("objective", 0, 0), ("after", 1, 0)],
        *[("objective", 1, 1), ("objective", 1, 1), ("after", 2, 1)],
    ]
    assert module.progress.total == 2


def test_a_checkpoint_alone_rebuilds_the_network_its_table_and_its_mechanics(tmp_path: Path) -> None:
    mechanics = {"sam": {"_target_": "callbacks.sam.SAM", "rho": 0.125}}
    module = make_module(mechanics, model=RESNET, trusted=False)
    fit(module, max_epochs=1, folder=tmp_path)
    restored = QuantModule.load_from_checkpoint(tmp_path / LAST)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored.eval()(images), module.eval()(images))
    assert restored.describe() == module.describe()
    assert restored.active[0].rho == 0.125
    assert bool(restored.prepared)


def test_a_checkpoint_cannot_name_any_target_it_likes(tmp_path: Path) -> None:
    fit(make_module(quantizer=FLOAT), max_epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match="tests.learning.tiny.TinyNet is refused"):
        QuantModule.load_from_checkpoint(tmp_path / LAST)


def test_the_initial_network_draws_no_noise(tmp_path: Path) -> None:
    module = make_module(checkpoint=float_weights(tmp_path / "float.safetensors", tiny_net()))
    before = torch.get_rng_state()
    module.initial_network()
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_copy_is_apart_from_the_host_and_computes_the_same() -> None:
    module = make_module()
    fit(module, max_epochs=1)
    copy = module.plain_copy()
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(copy(images), module.eval()(images))
    before = state(module)
    with torch.no_grad():
        for tensor in (*copy.parameters(), *copy.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())


def test_what_was_measured_is_logged() -> None:
    module = make_module(quantizer=FLOAT)
    trainer = fit(module, max_epochs=1)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/step/task"} <= set(logged)
    data = make_data()
    batches = list(data.val_dataloader())
    module.eval()
    with torch.no_grad():
        outputs = torch.cat([module(images) for images, _ in batches])
    labels = torch.cat([targets for _, targets in batches])
    torch.testing.assert_close(logged["val/loss"], nn.functional.cross_entropy(outputs, labels))
    torch.testing.assert_close(logged["val/accuracy"], (outputs.argmax(1) == labels).float().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "yes"}, "compile=yes: use one of none, quantizers, network, auto"),
        ({"model": {"_target_": "torch.nn.Identity"}}, "model._target_=torch.nn.Identity: use a model"),
        ({"mechanics": {"sam": {"_target_": "callbacks.distillation.Distillation"}}}, "name the key distillation"),
        ({"mechanics": {"sam": {"_target_": "lightning.pytorch.Callback"}}}, "callbacks.sam._target_=.*use a Mechanic"),
    ],
)
def test_bad_hyper_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**changes)


def test_a_run_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.max_epochs=-1"):
        fit(make_module(), max_epochs=-1)


def test_the_optimizer_is_the_one_asked_for() -> None:
    trainer = fit(make_module(optimizer={**SGD, "lr": 0.5}), max_epochs=1, limit_train_batches=1)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.5


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    fit(make_module(), folder=tmp_path, max_epochs=1)
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    torch.save({**checkpoint, "rng": checkpoint["rng"] * 2}, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="^trainer.devices: 2 processes wrote the checkpoint and 1 would go on"):
        fit(make_module(), resume=tmp_path / "two.ckpt", max_epochs=2)
