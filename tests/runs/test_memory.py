import resource

import pytest
import torch

from research.runs.memory import keep_freed_memory


def test_what_was_freed_is_not_fetched_from_the_system_again() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library does not take the request")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1 << 21) for _ in range(8)]  # 64 MiB: 16,384 pages
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for _ in range(6):  # until the heap has room for all of them in a row
        faults()
    assert faults() < 1000
