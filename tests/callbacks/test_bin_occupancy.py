"""The meter of occupancy in a fit: what it logs of weights and inputs, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from callbacks.bin_occupancy import BinOccupancy
from research.quant.occupancy import Occupancy, occupancy
from tests.callbacks.test_oscillation_mechanics import EAGER, FAST, TWO_BITS
from tests.learning.tiny import LSQ, fit, make_module

LOGGED = ("entropy", "entropy_ratio", "clipped")


def config(**options: Any) -> dict[str, Any]:
    return {"bin_occupancy": {"_target_": "callbacks.bin_occupancy.BinOccupancy", **options}}


def numbers(name: str, each: Occupancy) -> dict[str, float]:
    return {f"bin_occupancy/{name}/{key}": getattr(each, key) for key in LOGGED}


def test_weights_and_inputs_are_logged_as_they_stand_after_the_epoch() -> None:
    module = make_module(config(images=12), quantizer=LSQ)
    metrics = fit(module, max_epochs=1).callback_metrics
    logged = {name: float(value) for name, value in metrics.items() if name.startswith("bin_occupancy/")}
    (meter,) = module.active
    assert isinstance(meter, BinOccupancy) and meter.inputs is not None and len(meter.inputs) == 12
    expected: dict[str, float] = {}
    net = module.plain_copy()
    inner = net.dropout(net.flatten(net.pool(net.relu(net.bn1(net.conv1(meter.inputs))))))
    for name, layer, x in (("conv1", net.conv1, meter.inputs), ("fc", net.fc, inner)):
        for tensor, quantizer, values in (
            ("weight", layer.weight_quantizer, layer.weight),
            ("input", layer.input_quantizer, x),
        ):
            expected |= numbers(f"{name}.{tensor}", occupancy(quantizer, values, quantizer.codes(values)))
    assert logged == pytest.approx(expected)
    assert 0 < logged["bin_occupancy/conv1.input/entropy"] <= 4


def test_every_second_epoch_and_weights_only() -> None:
    module = make_module(config(every_n_epochs=2))
    (meter,) = module.active
    looks: list[int] = []
    meter.look = lambda host, images: looks.append(host.progress.step) or {}  # type: ignore[attr-defined]
    fit(module, max_epochs=5)
    assert looks == [8, 16]
    del meter.look  # type: ignore[attr-defined]
    assert isinstance(meter, BinOccupancy)
    assert sorted(meter.look(module)) == ["conv1.weight", "fc.weight"]


def test_frozen_codes_count_as_what_they_are() -> None:
    module = make_module({**config(), **EAGER}, optimizer=FAST, quantizer=TWO_BITS)
    fit(module, max_epochs=1)
    meter, freezing = module.active
    assert isinstance(meter, BinOccupancy)
    history = freezing.histories["conv1"]  # type: ignore[attr-defined]
    history.frozen.fill_(True)
    history.frozen_codes.fill_(-2)
    assert meter.look(module)["conv1.weight"].shares == {-2: 1.0, -1: 0.0, 0: 0.0, 1: 0.0}


def test_wider_tensors_are_left_out() -> None:
    recipe = {**LSQ, "rules": [{"match": "@first", "weight": {"bits": 8}}, {"match": "@last", "input": {"bits": 8}}]}
    module = make_module(config(max_bits=4), quantizer=recipe)
    (meter,) = module.active
    assert isinstance(meter, BinOccupancy)
    assert list(meter.look(module, torch.rand(4, 3, 8, 8))) == ["fc.weight", "conv1.input"]


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.bin_occupancy\.images=-1: use 0 or more$"):
        BinOccupancy(images=-1)
    with pytest.raises(ValueError, match=r"^callbacks\.bin_occupancy\.every_n_epochs=0: use 1 or more$"):
        BinOccupancy(every_n_epochs=0)
    with pytest.raises(ValueError, match=r"^callbacks\.bin_occupancy\.images=99 .* has 32 images"):
        fit(make_module(config(images=99)), max_epochs=1)
