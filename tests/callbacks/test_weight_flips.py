"""The meter of flips: it counts what has changed since its last look, by steps or by epochs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.weight_flips import LastCodes, WeightFlips, read_codes
from tests.callbacks.test_oscillation_mechanics import EAGER, FAST, TWO_BITS
from tests.learning.tiny import LSQ, fit, make_module

BINARY: dict[str, Any] = {"weight": {"name": "binary", "bits": 1, "granularity": "channel"}}


def config(**options: Any) -> dict[str, Any]:
    return {"weight_flips": {"_target_": "callbacks.weight_flips.WeightFlips", **options}}


class Codes(pl.Callback):
    """Keeps the codes of every layer at the start and after every step, and every metric that is logged at once."""

    def __init__(self) -> None:
        self.codes: list[dict[str, Tensor]] = []

    def take(self, module: Any) -> None:
        meter = next(mechanic for mechanic in module.active if mechanic.slug == "weight_flips")
        self.codes.append({name: read_codes(layer).clone() for name, layer in meter.layers.items()})

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.take(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.take(module)


def shares(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    counts = {name: int((one[name] != other[name]).sum()) for name in one}
    found = {f"weight_flips/{name}": count / one[name].numel() for name, count in counts.items()}
    return {**found, "weight_flips/all": sum(counts.values()) / sum(codes.numel() for codes in one.values())}


@pytest.mark.parametrize("quantizer", [TWO_BITS, BINARY, {"weight": {"name": "lq_nets", "bits": 2}}])
@pytest.mark.parametrize("every", [1, 2])
def test_by_epochs_it_is_against_the_last_look(quantizer: dict[str, Any], every: int) -> None:
    codes = Codes()
    module = make_module(config(every_n_epochs=every), optimizer=FAST, quantizer=quantizer)
    metrics = fit(module, max_epochs=2, callbacks=(codes,)).callback_metrics
    expected = shares(codes.codes[8], codes.codes[4 if every == 1 else 0])
    logged = {name: float(value) for name, value in metrics.items() if name.startswith("weight_flips/")}
    assert logged == pytest.approx(expected)
    assert 0 < logged["weight_flips/all"] < 1


def test_by_steps_the_loggers_get_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, dict[str, float]]] = []

    class Logger:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            rows.append((step, metrics))

    codes = Codes()
    module = make_module(config(every_n_steps=3), optimizer=FAST, quantizer=TWO_BITS)
    monkeypatch.setattr(type(module), "loggers", [Logger()])
    metrics = fit(module, max_epochs=2, callbacks=(codes,)).callback_metrics
    assert [step for step, _ in rows] == [2, 5]
    assert [row.pop("epoch") for _, row in rows] == [0, 1]
    for step, row in rows:
        assert row == pytest.approx(shares(codes.codes[step + 1], codes.codes[step - 2]))
    assert not [name for name in metrics if name.startswith("weight_flips/")]


def test_a_frozen_code_does_not_flip() -> None:
    module = make_module({**config(), **EAGER}, optimizer=FAST, quantizer=TWO_BITS)
    fit(module, max_epochs=2)
    freezing, flips = module.active
    assert isinstance(flips, WeightFlips)
    for name, layer in flips.layers.items():
        history = freezing.histories[name]  # type: ignore[attr-defined]
        layer.weight.data[history.frozen] *= -1
        free = int((layer.weight_quantizer.codes(layer.weight) != flips.last[name].codes).sum())  # type: ignore[union-attr]
        assert free > flips.last[name].look(read_codes(layer), layer.weight_quantizer.bits) == 0  # type: ignore[union-attr, operator]


def test_another_width_is_no_flip_and_is_left_out_once() -> None:
    last = LastCodes(torch.zeros(4), torch.tensor(2.0))
    assert last.look(torch.tensor([0, 0, 1, 1]), torch.tensor(2.0)) == 2
    assert last.look(torch.tensor([5, 5, 5, 5]), torch.tensor(4.0)) is None
    assert last.look(torch.tensor([5, 5, 5, 4]), torch.tensor(4.0)) == 1
    module = make_module(config())
    (flips,) = module.active
    assert isinstance(flips, WeightFlips)
    flips.look()
    for layer in flips.layers.values():
        layer.weight_quantizer.bits -= 1  # type: ignore[union-attr, operator]
    assert flips.look() == {}
    assert flips.look() == {"weight_flips/conv1": 0.0, "weight_flips/fc": 0.0, "weight_flips/all": 0.0}


def test_wider_weights_are_left_out() -> None:
    recipe = {**LSQ, "rules": [{"match": "@last", "weight": {"bits": 8}}]}
    (flips,) = make_module(config(max_bits=4), quantizer=recipe).active
    assert isinstance(flips, WeightFlips)
    assert list(flips.layers) == ["conv1"]


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"every_n_steps": 0}])
def test_settings_that_mean_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.weight_flips\.{next(iter(options))}=0: use 1 or more$"):
        WeightFlips(**options)
