"""The toy regression against what can be said of it in closed form."""

from __future__ import annotations

import pytest
import torch

from analysis.figures.oscillation_toy import draw, toy_regression

LAST = 500


def test_one_weight_between_two_codes() -> None:  # cheap check 8
    lr = 0.01
    toy = toy_regression(torch.tensor([0.1], dtype=torch.float64), 1500, lr)
    assert float(toy.frequency[-LAST:].mean()) == pytest.approx(0.2, rel=0.01)
    assert float(toy.codes[-LAST:].mean()) == pytest.approx(0.1, rel=0.01)
    assert float((toy.latent[-LAST:] - 0.5).abs().max()) <= lr


@pytest.mark.parametrize("lr", [0.005, 0.02])
def test_the_frequency_is_twice_the_distance_whatever_the_rate(lr: float) -> None:
    distances = torch.tensor([0.2, 0.35, 0.5], dtype=torch.float64)
    found = toy_regression(distances, 1500, lr).frequency[-LAST:].mean(0)
    torch.testing.assert_close(found, 2 * distances, rtol=0.02, atol=0)


@pytest.mark.parametrize(("rule", "changes"), [("ste", True), ("ewgs", True), ("dampening", False)])
def test_only_dampening_settles(rule: str, changes: bool) -> None:
    toy = toy_regression(torch.tensor([0.2]), 1500, 0.01, rule)  # type: ignore[arg-type]
    assert bool((toy.codes[-LAST:].diff(dim=0) != 0).any()) == changes


def test_the_data_of_the_figure() -> None:
    table = draw([], steps=400, lr=0.05).table
    assert len(table) == 25
    assert all(frequency == pytest.approx(2 * distance, abs=0.1) for distance, frequency in table)
    with pytest.raises(ValueError, match="steps=1 lr=0.01: use 10 steps or more"):
        draw([], steps=1)
