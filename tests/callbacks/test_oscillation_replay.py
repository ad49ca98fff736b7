"""Fits with freezing and with dampening, done again step by step from what was recorded, by the pure functions."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.oscillation.frozen import FreezeTo, Freezing, freeze
from callbacks.oscillation.schedule import annealed
from research.quant.oscillation import start, track
from tests.callbacks.test_oscillation_mechanics import FAST, TWO_BITS, config, named
from tests.learning.tiny import fit, make_module

EPOCHS, STEPS = 5, 20
WARMUP, MOMENTUM = 0.25, 0.2
FALLING = (0.5, 0.15)
TERM = "train/step/oscillation_dampening"


class Record(pl.Callback):
    """The codes of every latent weight, frozen or not, at the start and after every step; and what is then frozen."""

    def __init__(self) -> None:
        self.codes: dict[str, list[Tensor]] = {}
        self.found: dict[str, list[Freezing]] = {}

    def look(self, module: Any) -> None:
        for name, layer in named(module, "oscillation_freezing").layers.items():
            self.codes.setdefault(name, []).append(layer.weight_quantizer.codes(layer.weight))

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.look(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.look(module)
        for name, history in named(module, "oscillation_freezing").histories.items():
            state = Freezing(*(getattr(history, field).clone() for field in Freezing._fields))
            self.found.setdefault(name, []).append(state)


def replay(codes: list[Tensor], freeze_to: FreezeTo) -> list[Freezing]:
    """What is frozen after every step; up to the end of the warm-up nothing is."""
    first, *later = codes
    oscillation = start(first)
    freezing = Freezing(torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(first), torch.zeros(first.shape))
    states = []
    for step, latent in enumerate(later, start=1):
        used = torch.where(freezing.frozen, freezing.frozen_codes, latent)
        oscillation = track(oscillation, used, MOMENTUM)
        if step == WARMUP * STEPS:
            freezing = freezing._replace(average=used.float())
        if step >= WARMUP * STEPS:
            threshold = annealed(step, STEPS, *FALLING, WARMUP)
            freezing = freeze(freezing, used, oscillation.frequency, MOMENTUM, threshold, freeze_to)
        states.append(freezing)
    return states


@pytest.mark.parametrize("freeze_to", ["average", "current"])
def test_every_step_of_a_fit_with_freezing_is_that_of_the_pure_functions(freeze_to: FreezeTo) -> None:
    first, final = FALLING
    options = {"threshold_start": first, "threshold_final": final, "warmup": WARMUP, "momentum": MOMENTUM}
    mechanics = config("oscillation_freezing", freeze_to=freeze_to, **options)
    record = Record()
    fit(make_module(mechanics, optimizer=FAST, quantizer=TWO_BITS), max_epochs=EPOCHS, callbacks=(record,))
    counts = torch.zeros(STEPS)
    others = 0
    for name, codes in record.codes.items():
        expected = replay(codes, freeze_to)
        for found, state in zip(record.found[name], expected, strict=True):
            assert torch.equal(found.frozen, state.frozen)
            assert torch.equal(found.frozen_codes.int(), state.frozen_codes)
            torch.testing.assert_close(found.average, state.average)
        counts += torch.stack([state.frozen.sum() for state in expected])
        other = replay(codes, "current" if freeze_to == "average" else "average")[-1]
        others += int((other.frozen_codes != expected[-1].frozen_codes).sum())
    assert len(counts.unique()) > 3, "codes freeze at several steps"
    assert others > 0, "and not all at the same code with the other setting"


class Strengths(pl.Callback):
    """The term of every step in units of the penalty that its weights have."""

    def __init__(self) -> None:
        self.penalties: list[float] = []
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.penalties.append(float(named(module, "oscillation_dampening").penalty().detach()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        self.found.append(float(trainer.callback_metrics.get(TERM, 0.0)) / self.penalties[-1])


@pytest.mark.parametrize(("first", "final"), [(0.0, 0.4), (0.3, 0.1)], ids=["rising", "falling"])
def test_every_step_of_a_fit_with_dampening_has_the_strength_of_the_schedule(first: float, final: float) -> None:
    watch = Strengths()
    mechanics = config("oscillation_dampening", strength_start=first, strength=final, warmup=WARMUP)
    fit(make_module(mechanics, optimizer=FAST, quantizer=TWO_BITS), max_epochs=EPOCHS, callbacks=(watch,))
    assert len(watch.found) == STEPS
    expected = [annealed(step, STEPS, first, final, WARMUP) for step in range(1, STEPS + 1)]
    assert watch.found == pytest.approx(expected, rel=1e-5)
