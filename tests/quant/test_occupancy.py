"""Occupancy of codes: shares, entropy, and what counts as clipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from research.quant.occupancy import Occupancy, clipped_share, code_shares, occupancy
from research.quant.quantizers import REGISTRY, Quantizer, QuantizerSpec, build_quantizer


def build(name: str, bits: int, **options: object) -> Quantizer:
    quantizer = build_quantizer(QuantizerSpec(name=name, bits=bits, options=dict(options)), (8, 4, 3, 3), 0, "weight")
    quantizer.initialise(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    return quantizer.eval()


def test_shares_name_every_code_of_the_grid_in_order() -> None:
    assert code_shares(torch.tensor([[3, -1], [-1, 1]]), -3, 3, 2) == {-3: 0.0, -1: 0.5, 1: 0.25, 3: 0.25}
    assert list(code_shares(torch.tensor([0, 0]), -2, 1)) == [-2, -1, 0, 1]


@pytest.mark.parametrize(
    ("shares", "entropy", "ratio"),
    [
        ({-1: 0.25, 0: 0.25, 1: 0.25, 2: 0.25}, 2.0, 1.0),
        ({-1: 0.5, 0: 0.5, 1: 0.0, 2: 0.0}, 1.0, 0.5),
        ({0: 1.0, 1: 0.0}, 0.0, 0.0),
        ({0: 1.0}, 0.0, 0.0),
        ({0: 0.5, 1: 0.25, 2: 0.25}, 1.5, 1.5 / math.log2(3)),
    ],
)
def test_entropy_in_bits_and_as_a_part_of_even_shares(shares: dict[int, float], entropy: float, ratio: float) -> None:
    found = Occupancy(shares, 0.0)
    assert found.entropy == pytest.approx(entropy)
    assert found.entropy_ratio == pytest.approx(ratio)


def test_clipped_is_what_lies_outside_the_range() -> None:
    quantizer = build("lsq", 3)
    low, high = (float(limit * quantizer.scale) for limit in quantizer.limits())
    x = torch.linspace(2 * low, 2 * high, 1000)
    assert clipped_share(quantizer, x) == pytest.approx(float(((x < low) | (x > high)).float().mean()))
    assert clipped_share(quantizer, torch.tensor([low, 0.0, high])) == 0.0


def test_elements_that_are_normalised_together_are_not_clipped_by_that() -> None:
    x = torch.randn(8, 4, 3, 3)
    assert clipped_share(build("binary", 1), x) == 0.0
    liq = build("liq", 3)
    standardised = (x - x.mean()) / x.std()
    outside = float((standardised.abs() > float(liq.scale * liq.limits()[1])).float().mean())
    assert 0 < clipped_share(liq, x) == pytest.approx(outside, abs=0.01)


@pytest.mark.parametrize("name", REGISTRY)
def test_it_counts_every_element_and_moves_nothing(name: str) -> None:
    quantizer = build(name, 1 if name == "binary" else 3)
    x = torch.randn(8, 4, 3, 3)
    codes = copy.deepcopy(quantizer).codes(x)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    found = occupancy(quantizer, x, codes)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert len(found.shares) == 2 ** int(quantizer.bits), "one share per code of the grid"
    assert 0 <= found.clipped < 1
    assert 0 < found.entropy_ratio <= 1 + 1e-9
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
