"""The epoch's training loss and metrics: exact, however many steps are counted together and wherever it was saved."""

from __future__ import annotations

import pytest
import torch

from research.learning import epoch_metrics
from research.learning.epoch_metrics import EpochMetrics
from research.learning.tasks.classification import Classification

STEPS = 50


def metrics() -> EpochMetrics:
    return EpochMetrics(Classification(4).metrics("train/"))


def feed(counted: EpochMetrics, start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = 2 + torch.randn(STEPS, generator=generator)
    outputs = torch.randn(STEPS, 8, 4, generator=generator)
    targets = torch.randint(4, (STEPS, 8), generator=generator)
    for step in range(start, stop):
        counted.add(losses[step], outputs[step], targets[step])


@pytest.mark.parametrize("saved_after", [1, 19, 20, 33])
def test_a_checkpoint_anywhere_changes_nothing(saved_after: int) -> None:
    whole, first, second = metrics(), metrics(), metrics()
    feed(whole, 0, STEPS)
    feed(first, 0, saved_after)
    second.float().load_state_dict(first.state_dict())
    feed(second, saved_after, STEPS)
    expected, found = whole.compute(), second.compute()
    assert expected.keys() == found.keys() == {"train/loss", "train/accuracy"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_they_are_the_mean_and_the_share_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = metrics()
    feed(at_once, 0, STEPS)
    monkeypatch.setattr(epoch_metrics, "COUNTED_TOGETHER", 1)
    one_by_one = metrics()
    feed(one_by_one, 0, STEPS)
    assert at_once.compute() == one_by_one.compute()
    losses = 2 + torch.randn(STEPS, generator=torch.Generator().manual_seed(0))
    assert float(at_once.compute()["train/loss"]) == pytest.approx(float(losses.double().mean()), rel=1e-7)


def test_a_new_epoch_begins_with_nothing() -> None:
    counted, fresh = metrics(), metrics()
    feed(counted, 0, 7)
    counted.reset()
    feed(counted, 10, 30)
    feed(fresh, 10, 30)
    assert counted.compute() == fresh.compute()
