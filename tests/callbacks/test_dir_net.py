"""DIR-Net and IR-Net: the schedule, the reconstructed parts, and what training does with them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.dir_net import DIRNet, active_share, attention, estimator_schedule, representation_loss
from research.learning.taps import Taps
from research.quant.layers import quantizers
from research.quant.quantizers.binary import Binary
from tests.learning.tiny import RESNET, fit, float_weights, make_module, state, tiny_net

WEIGHTS: dict[str, Any] = {"weight": {"name": "binary", "bits": 1, "granularity": "channel"}}
BOTH = {**WEIGHTS, "input": {"name": "binary", "bits": 1}}
TARGET = "callbacks.dir_net.DIRNet"
MODEL = tiny_net(dropout=0.25)
IR_NET = {"_target_": TARGET, "dte": "ede", "beta": 0.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_weights(tmp_path_factory.mktemp("float") / "net.safetensors", RESNET)


@pytest.mark.parametrize("name", ["resnet20", "vgg"])
def test_golden_schedule(golden: Callable[[str], dict[str, np.ndarray]], name: str) -> None:
    vectors = {key: golden("dir_net")[f"sched_{name}_{key}"] for key in ("t_min", "t_max", "epochs", "t", "k")}
    epochs = int(vectors["epochs"])
    found = [estimator_schedule(e / epochs, float(vectors["t_min"]), float(vectors["t_max"])) for e in range(epochs)]
    np.testing.assert_allclose([t for t, _ in found], vectors["t"], rtol=1e-12)
    np.testing.assert_allclose([k for _, k in found], vectors["k"], rtol=1e-12)


def test_4_and_5_the_two_stages_of_the_schedule() -> None:
    for t_min, epochs, turn, last in ((0.1, 300, 150, 9.848), (1e-3, 400, 300, 9.772)):
        found = [estimator_schedule(e / epochs, t_min, 10.0) for e in range(epochs)]
        assert found[0][0] == t_min and found[-1][0] == pytest.approx(last, abs=1e-3)
        assert all(t * k == pytest.approx(1) for t, k in found[: turn + 1])
        assert all(k == 1 and t * k > 1 for t, k in found[turn + 1 :])
        assert found[turn][0] == pytest.approx(1, rel=1e-12)


def test_8_without_share_and_weight_it_is_ir_net(weights: Path) -> None:
    trained = []
    for changes in ({"dte": "ede", "beta": 0.0}, {"eps": 0.0, "beta": 0.0}, {"eps": 0.9, "beta": 0.0}):
        module = make_module({"dir_net": {"_target_": TARGET, "t_min": 2.0, **changes}}, model=MODEL, quantizer=WEIGHTS)
        assert fit(module, max_epochs=3).global_step == 12
        trained.append(state(module.net))
    ede, none, capped = trained
    assert all(torch.equal(value, none[name]) for name, value in ede.items())
    assert not torch.equal(ede["conv1.weight"], capped["conv1.weight"])


def test_every_binary_quantizer_follows_the_epochs() -> None:
    model = {**RESNET, "activation": "hardtanh", "shortcut_per_conv": True}
    recipe = {**BOTH, "rules": [{"match": "@last", "weight": None, "input": None}]}
    module = make_module({"dir_net": {**IR_NET, "t_min": 0.001}}, model=model, quantizer=recipe)
    fit(module, max_epochs=3, limit_train_batches=2)
    t, k = estimator_schedule(2 / 3, 0.001, 10.0)
    found = [q for _, q in quantizers(module.net) if isinstance(q, Binary)]
    assert len(found) == 14
    assert all(float(q.t) == pytest.approx(t) and float(q.k) == pytest.approx(k) for q in found)


def test_the_share_of_weights_with_a_gradient_is_logged_and_kept(weights: Path) -> None:
    shares = []
    for dte in ("ede", "distribution_sensitive"):
        mechanic = {"_target_": TARGET, "dte": dte, "t_min": 500.0, "t_max": 500.0, "eps": 0.3, "beta": 0.0}
        module = make_module({"dir_net": mechanic}, model=MODEL, quantizer=WEIGHTS)
        trainer = fit(module, max_epochs=1, limit_train_batches=1)
        shares.append(float(trainer.callback_metrics["dir_net/active_share/conv1"]))
    assert shares[0] < 0.1 and shares[1] >= 0.3
    u = torch.tensor([-3.0, -0.1, 0.0, 0.1])
    assert active_share(u, torch.tensor(10.0), 0.1) == 0.75


def test_representations_are_compared_by_their_attention(weights: Path) -> None:
    one, other = torch.randn(2, 3, 4, 5, 5)
    assert representation_loss([one], [-7 * one]) == pytest.approx(0, abs=1e-7)
    energy = attention(one)
    torch.testing.assert_close(energy.norm(dim=1), torch.ones(3))
    expected = (energy - attention(other)).square().sum() / 3
    torch.testing.assert_close(representation_loss([one, one], [other, one]), expected)
    module = make_module(
        {"dir_net": {"_target_": TARGET, "beta": 2.0}}, model=RESNET, quantizer=WEIGHTS, checkpoint=weights
    )
    assert module.active[0].taps == module.net.structure().blocks == ("layer1.0", "layer2.0", "layer3.0")
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    assert float(trainer.callback_metrics["train/step/representation"]) > 0
    assert not any("teacher" in name for name in module.state_dict())


def test_the_term_is_the_distance_to_the_float_network_in_evaluation_mode(weights: Path) -> None:
    dir_net = {"_target_": TARGET, "beta": 2.0}
    module = make_module({"dir_net": dir_net}, model=RESNET, quantizer=WEIGHTS, checkpoint=weights)
    fit(module, max_epochs=1, limit_train_batches=1)
    images = torch.randn(6, 3, 8, 8)
    evaluation = module.objective((images, torch.arange(6) % 4))
    teacher = module.initial_network().eval()
    taps = Taps(teacher, module.active[0].taps)
    teacher(images)
    expected = 2 * representation_loss(evaluation.taps.values(), taps.take().values())
    torch.testing.assert_close(evaluation.terms["representation"], expected)
    torch.testing.assert_close(evaluation.loss, evaluation.terms["task"] + expected)
    assert float(expected.detach()) > 0.01


def test_every_quantizer_has_the_share_and_the_slope_and_inputs_are_capped_too() -> None:
    model = {**RESNET, "activation": "hardtanh", "shortcut_per_conv": True}
    recipe = {**BOTH, "rules": [{"match": "@last", "weight": None, "input": None}]}
    dir_net = {"_target_": TARGET, "eps": 0.3, "delta": 0.2, "beta": 0.0}
    module = make_module({"dir_net": dir_net}, model=model, quantizer=recipe).eval()
    found = [q for _, q in quantizers(module.net) if isinstance(q, Binary)]
    assert {(q.active_share, q.active_slope) for q in found} == {(0.3, 0.2)}
    quantizer = next(q for q in found if q.role == "input")
    for buffer, value in ((quantizer.t, 10.0), (quantizer.k, 1.0), (quantizer.quantile, 0.5)):
        buffer.fill_(value)
    x = torch.linspace(-1, 1, 51, requires_grad=True)
    (slope,) = torch.autograd.grad(quantizer(x).sum(), x)
    t = math.atanh(math.sqrt(1 - 0.2)) / 0.5
    torch.testing.assert_close(slope, t * (1 - torch.tanh(t * x.detach()).square()))
    assert float((slope >= 0.2 * t * (1 - 1e-4)).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "options",
    [{"t_min": 0.0}, {"t_min": 20.0}, {"dte": "plain"}, {"eps": 1.0}, {"delta": 0.0}, {"delta": 1.0}, {"beta": -1.0}],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.dir_net[^\n]*use"):
        DIRNet(**options)


def test_it_needs_binary_quantizers_and_something_to_compare() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.dir_net.*use quantizer=binary"):
        make_module({"dir_net": IR_NET})
