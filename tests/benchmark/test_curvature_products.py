"""The products that are timed are products with one matrix."""

from __future__ import annotations

import pytest
import torch

from analysis.benchmark.curvature import BY_HAND, products
from analysis.benchmark.networks import REFERENCE, Way


@pytest.mark.parametrize("bits", [32, 4])
def test_ours_is_the_double_backward_written_by_hand(bits: int) -> None:
    found = {
        name: product()
        for name, product in products(
            Way(bits, REFERENCE, model="resnet8"), images=6, batch_size=4, device="cpu"
        ).items()
    }
    same = ["surface=latent"] if bits < 32 else [name for name in found if name != BY_HAND]
    for name in same:
        torch.testing.assert_close(
            found[name], found[BY_HAND], rtol=1e-4, atol=1e-5 * float(found[BY_HAND].abs().max())
        )
    torch.testing.assert_close(
        found["surface=quantized"], found["surface=quantized, graphs kept"], rtol=1e-4, atol=1e-4
    )
