"""SAMQ: what it refuses and what it warns of."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.samq import SAMQ
from research.learning.finalise import finalise
from research.quant.allocation import Allocation
from tests.callbacks.searches import THREE
from tests.callbacks.test_samq import BOPS, mechanic, samq, searching
from tests.learning.tiny import LSQ, RESNET, fit, make_data, make_module


def test_an_open_search_is_not_deployed() -> None:
    module = searching(until=0.9)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, host: Any) -> None:
            trainer.should_stop = True

    fit(module, callbacks=(Stop(),))
    with pytest.raises(ValueError, match=r"callbacks.samq: .*use finalise.weights=last"):
        finalise(module)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    mechanic(module).use([3] * 6)
    with pytest.raises(ValueError, match=r"callbacks.samq.budget.value=3: the widths cost 5 bits per weight"):
        finalise(module)


def test_a_policy_that_no_epoch_trained_and_a_budget_that_few_meet_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = searching(budget={**THREE, "value": 2.02}, tolerance=0.0)
    fit(module, max_epochs=1)
    assert "the policy has not been trained" in caplog.text
    assert "the nearest below among them" in caplog.text
    assert mechanic(module).within(Allocation.of(module.net))


def test_the_images_come_from_the_search_part_or_are_missed_by_name() -> None:
    with pytest.raises(ValueError, match=r"data.search=0: callbacks.samq .*callbacks.samq.images=train"):
        fit(searching(images="search"), max_epochs=1)
    module, data = searching(images="search", until=0.9), make_data(search=16, options={"train": 56, "test": 16})
    fit(module, data, max_epochs=1, limit_train_batches=2)
    held_out, found = list(data.search_dataloader()), list(mechanic(module).batches(0, None))
    assert [torch.equal(one[0], other[0]) for one, other in zip(found, held_out, strict=True)] == [True, True]


@pytest.mark.parametrize(("total", "until", "step"), [(100, 0.6, 60), (3910, 0.6, 2346), (2, 0.6, 1), (2, 0.1, 1)])
def test_when_the_search_ends(total: int, until: float, step: int) -> None:
    assert SAMQ(budget=THREE, until=until, warmup=0.0).last_step(total) == step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [0, 2]}, "bits"),
        ({"bits": []}, "bits"),
        ({"images": "test"}, "images=test"),
        ({"policy_batches": 0}, "policy_batches=0"),
        ({"candidates": 0}, "candidates=0"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"unit": 0.0}, "unit=0.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"baseline": 1.0}, "baseline=1.0"),
        ({"warmup": 0.7}, ".*warmup=0.7"),
        ({"until": 1.0}, ".*until=1.0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
        ({"budget": [THREE, BOPS]}, "budget: a target is one budget, not 2"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.samq[.:]{message}"):
        SAMQ(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "options", "message"),
    [
        ({}, {}, "no quantized weight"),
        ({**LSQ, "weight": {"name": "ewgs", "bits": 4}}, {}, "EWGS"),
        ({**LSQ, "widths": [2, 4]}, {}, r"quantizer.widths=\[\]"),
        ({**LSQ, "fold_bn": 2}, {}, "fold_bn=none"),
        ({**LSQ}, {"bits": [1, 2]}, "lsq takes 2 to 8 bits"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(
    quantizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"callbacks.samq: .*{message}"):
        make_module(samq(**options), model=RESNET, quantizer=quantizer)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"callbacks.samq.budget.value=1.5: feasible are 2 to 5 bits per weight"):
        fit(searching(budget={**THREE, "value": 1.5}), max_epochs=1)
