"""What keys the compiler's cache: the number of threads, and whether there are vector instructions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa

from research.quant.compiler import compiler_options, vectorises

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels for a GPU need no vector instructions")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    vectorises.cache_clear()
    yield
    vectorises.cache_clear()


def test_jobs_with_other_numbers_of_threads_share_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: object())
    assert compiler_options(1) == {"cpp.threads": 1}
    assert compiler_options(2) == {"cpp.threads": 2}


def test_without_vector_instructions_the_kernels_are_kept_apart_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def failed() -> cpu_vec_isa.VecISA:
        asked.append(None)
        return cpu_vec_isa.invalid_vec_isa

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", failed)
    for _ in range(2):
        assert compiler_options(1) == {"cpp.threads": 1, "cpp.simdlen": 1}
    assert len(asked) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("compile: the compiler finds no vector instructions")
