"""What keys the compiler's cache, and what a compiled forward pass keeps."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa

from research.quant.compiler import compiler_options, vectorises
from research.quant.masks import KeepNoMasks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels for a GPU need no vector instructions")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    vectorises.cache_clear()
    yield
    vectorises.cache_clear()


def test_jobs_with_other_numbers_of_threads_share_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: object())
    one, two = compiler_options(1), compiler_options(2)
    assert (one["cpp.threads"], two["cpp.threads"]) == (1, 2)
    assert "cpp.simdlen" not in one and isinstance(one["custom_partitioner_fn"], KeepNoMasks)


def test_without_vector_instructions_the_kernels_are_kept_apart_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def failed() -> cpu_vec_isa.VecISA:
        asked.append(None)
        return cpu_vec_isa.invalid_vec_isa

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", failed)
    for _ in range(2):
        assert compiler_options(1)["cpp.simdlen"] == 1
    assert len(asked) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("compile: the compiler finds no vector instructions")


def test_a_compiled_forward_pass_keeps_no_masks() -> None:
    """The compiler by itself keeps the three masks below, for they are smaller than ``x``."""
    x, noise = torch.randn(4, 8, 16, 16, requires_grad=True), torch.rand(4, 8, 16, 16)

    def masked(x: Tensor) -> Tensor:
        hidden = torch.where((x > 0.1) & (x <= 0.7), 2 * x, torch.where(x.sin() > 0.7, 3.0, 0.0))
        return torch.where(noise > 0.5, hidden.cumsum(0), hidden)

    def kept(options: dict[str, Any]) -> tuple[set[torch.dtype], Tensor, Tensor]:
        torch.compiler.reset()
        dtypes: set[torch.dtype] = set()

        def note(tensor: Tensor) -> Tensor:
            dtypes.add(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = torch.compile(masked, options=options)(x)
        return dtypes, y, torch.autograd.grad(y.sum(), x)[0]

    options = compiler_options(1)
    dtypes, y, gradient = kept(options)
    assert torch.bool not in dtypes
    assert torch.bool in kept({key: value for key, value in options.items() if key != "custom_partitioner_fn"})[0]
    expected = masked(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


CACHED = """
import sys, torch
from torch._dynamo.utils import counters
from research.quant.compiler import cache_derivatives, compiler_options

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * FACTOR

FACTOR = float(sys.argv[1])
cache_derivatives()
x = torch.ones(3, requires_grad=True)
torch.compile(lambda x: Doubled.apply(x).sin(), options=compiler_options(1))(x).sum().backward()
print(float(x.grad[0] / torch.cos(torch.tensor(2.0))), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_the_cache_keeps_functions_with_derivatives_of_their_own_and_knows_them_apart(tmp_path: Path) -> None:
    def start(factor: int) -> list[float]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", CACHED, str(factor)]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return [round(float(number), 5) for number in printed.split()]

    assert start(2) == [2, 0]
    assert start(2) == [2, 1], "the second start takes what the first one made"
    assert start(3) == [3, 0], "another backward pass is another function"
