"""Grids: which codes a width has and what they stand for."""

import pytest
import torch

from research.quant.grid import Grid, code_limits

LIMITS = [
    (Grid("uniform"), [(0, 0), (-1, 0), (-2, 1), (-128, 127)]),
    (Grid("uniform", narrow=True), [(0, 0), (0, 0), (-1, 1), (-127, 127)]),
    (Grid("uniform", signed=False), [(0, 0), (0, 1), (0, 3), (0, 255)]),
    (Grid("midrise"), [(0, 0), (-1, 1), (-3, 3), (-255, 255)]),
    (Grid("codebook"), [(0, 0), (0, 1), (0, 3), (0, 255)]),
    (Grid("log"), [(0, 0), (0, 0), (-1, 1), (-127, 127)]),
    (Grid("log", signed=False), [(0, 0), (0, 1), (0, 3), (0, 255)]),
]


@pytest.mark.parametrize(("grid", "expected"), LIMITS, ids=str)
def test_limits_at_0_1_2_and_8_bits(grid: Grid, expected: list[tuple[int, int]]) -> None:
    qmin, qmax = grid.limits(torch.tensor([0.0, 1.0, 2.0, 8.0]))
    assert list(zip(qmin.tolist(), qmax.tolist(), strict=True)) == expected


def test_unsigned_codes_have_no_narrow_form() -> None:
    qmin, qmax = code_limits(torch.tensor(4.0), torch.tensor([False, True]), narrow=True)
    assert qmin.tolist() == [0, -7] and qmax.tolist() == [15, 7]
    with pytest.raises(ValueError, match="needs a signed grid"):
        Grid("uniform", signed=False, narrow=True)


def test_values_of_grids_without_equal_steps() -> None:
    codes = torch.tensor([-3, -1, 0, 1, 3])
    values = Grid("log").values(codes, torch.tensor(0.5), torch.tensor(-2.0))
    assert values.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    codebook = torch.tensor([-2.0, 0.1, 5.0, 7.0], requires_grad=True)
    values = Grid("codebook").values(torch.tensor([[2, 0], [2, 3]]), codebook)
    assert values.tolist() == [[5.0, -2.0], [5.0, 7.0]]
    values.sum().backward()
    assert codebook.grad is not None and codebook.grad.tolist() == [1.0, 0.0, 2.0, 1.0]


def test_a_codebook_per_channel() -> None:
    codes = torch.randint(0, 4, (3, 2, 5, 5))
    codebooks = torch.randn(3, 4)
    values = Grid("codebook").values(codes, codebooks.reshape(3, 1, 1, 1, 4))
    assert torch.equal(values, torch.stack([book[row] for book, row in zip(codebooks, codes, strict=True)]))
