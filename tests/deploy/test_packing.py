from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.deploy.packing import pack_codes, packed_size, unpack_codes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    qmin=st.integers(-255, 5),
    step=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_packing_and_unpacking_gives_the_codes(bits: int, shape: list[int], qmin: int, step: int, seed: int) -> None:
    fields = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    codes = fields * step + qmin
    data = pack_codes(codes, bits, qmin, step)
    assert data.dtype == torch.uint8
    assert data.shape == (packed_size(codes.numel(), bits),)
    assert torch.equal(unpack_codes(data, bits, qmin, shape, step), codes)


def test_the_layout_is_little_endian_and_dense() -> None:
    assert pack_codes(torch.tensor([-8, 7, 0]), 4, -8).tolist() == [0xF0, 0x08]
    assert pack_codes(torch.tensor([1, 2, 3]), 3, 0).tolist() == [0b11_010_001, 0]
    assert pack_codes(torch.tensor([0, 1, 7]), 3, 0).tolist() == [0b11_001_000, 1]
    assert pack_codes(torch.tensor([-1, 1, 1, -1]), 1, -1, 2).tolist() == [0b0110]


@pytest.mark.parametrize(("codes", "bits", "qmin", "step"), [([8], 4, -8, 1), ([-9], 4, -8, 1), ([0], 2, -3, 2)])
def test_codes_that_do_not_fit_are_refused(codes: list[int], bits: int, qmin: int, step: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_codes(torch.tensor(codes), bits, qmin, step)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack_codes(torch.tensor([0]), bits, 0)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes do not hold 5 codes of 4 bits"):
        unpack_codes(torch.zeros(2, dtype=torch.uint8), 4, 0, (5,))
