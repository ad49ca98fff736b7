"""What graphs keep is counted in bytes, while they keep it."""

from __future__ import annotations

import torch
from torch import nn

from analysis.benchmark.saved import SavedMemory

MIB = 2**20


def test_shared_memory_counts_once_and_parameters_do_not() -> None:
    x, weight = torch.ones(512, 512, requires_grad=True), nn.Parameter(torch.ones(512, 512))
    with SavedMemory([weight]) as saved:
        y = x.exp()  # keeps y
        z = y * weight  # keeps y and the weight
        assert saved.kept == MIB
        z.square().sum().backward()  # keeps z, lets go of all
    assert (saved.kept, saved.peak) == (0, 2 * MIB)


def test_the_peak_is_of_what_is_kept_at_one_time() -> None:
    x = torch.ones(512, 512, requires_grad=True)
    with SavedMemory([]) as saved:
        for _ in range(3):
            x.exp().sum().backward()
    assert (saved.kept, saved.peak) == (0, MIB)


def test_second_derivatives_keep_more() -> None:
    x = torch.full((512, 512), 0.5, requires_grad=True)
    with SavedMemory([x]) as first:
        torch.autograd.grad(x.exp().sin().sum(), x)
    with SavedMemory([x]) as second:
        (gradient,) = torch.autograd.grad(x.exp().sin().sum(), x, create_graph=True)
        assert second.kept > 0
        gradient.sum().backward()
    assert second.peak > first.peak
