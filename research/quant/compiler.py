"""What torch.compile has to be told: so that its cache never gives a job the kernels of another machine state, and so
that its kernels for processors are as fast as they can be."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def compiler_options(threads: int) -> dict[str, Any]:
    """Options of torch.compile for kernels on so many threads.

    Inductor's cache asks neither for how many threads a kernel was made nor whether it was vectorised; as options both
    are part of its keys. Without them a job with two cores runs the kernels that a job with one has left, and all jobs
    run what one has left whose check for vector instructions failed.
    """
    options: dict[str, Any] = {"cpp.threads": threads}
    if torch.cuda.is_available():
        return options
    from research.quant.masks import KeepNoMasks  # imports the compiler

    options["custom_partitioner_fn"] = KeepNoMasks()
    if not vectorises():
        options["cpp.simdlen"] = 1  # scalar, as it would be anyway
    return options


@cache
def vectorises() -> bool:
    """Whether the compiler's kernels use this processor's vector instructions; the log warns where they do not.

    The compiler tries them out in a process of its own, which a full machine can make fail.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # as heavy as the compiler: only where it is used

    if pick_vec_isa():
        return True
    log.warning(
        "compile: the compiler finds no vector instructions on this processor; its kernels can be 30 times slower than "
        "compile=none"
    )
    return False


def cache_derivatives() -> None:
    """Have the compiler's cache keep networks in which functions have derivatives of their own, as quantizers do.

    By default it does not, and every start traces the whole backward pass again. The two directions of such a function
    are traced like everything else, and part of the cache's keys.
    """
    from torch._functorch import config

    if hasattr(config, "autograd_cache_allow_custom_autograd_functions"):
        config.autograd_cache_allow_custom_autograd_functions = True


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs here: a C++ compiler, or a GPU with Triton."""
    if torch.cuda.is_available():
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


class FlatKernel:
    """A function of 1-D tensors of one length and 0-dim tensors, flat ones first, compiled for every length.

    On processors it is compiled directly. `torch.compile` checks at every call, in 40 to 100 microseconds, that the
    arguments are what it compiled for; here the caller promises dense tensors of one length.
    Kernels are kept by dtypes, by number of threads, and by whether a tensor is short: those for short ones are planned
    for a single thread.

    Args:
        function: what to compile.
        short: greatest length that a single thread is to work on.
        options: further ones of the compiler.
    """

    def __init__(self, function: Callable[..., Any], short: int, options: Mapping[str, Any] | None = None) -> None:
        self.function, self.short = function, short
        self.options = options or {}
        self._made: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        """What the function gives, without a graph for derivatives."""
        flat = arguments[0]
        dtypes = tuple([argument.dtype for argument in arguments])
        key = dtypes, flat.device, torch.get_num_threads(), flat.numel() <= self.short
        if key not in self._made:
            self._made[key] = self._make(arguments)
        return self._made[key](*arguments)

    def _make(self, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
        flat = arguments[0]
        options = {**compiler_options(torch.get_num_threads()), **self.options}
        if flat.is_cuda:
            kernel = torch.compile(self.function, dynamic=True, fullgraph=True, options=options)
            return lambda *tensors: kernel(*map(_plain, tensors))
        from torch._inductor import standalone_compile  # as heavy as the compiler: only where it is used
        from torch.fx.experimental.proxy_tensor import make_fx

        length = self.short // 8 if flat.numel() <= self.short else 32 * self.short  # what the kernel is planned for
        with torch.no_grad():
            examples: list[Any] = [
                argument.new_zeros(length) if argument.ndim else argument.clone() for argument in arguments
            ]
            # by way of a function without annotations, which the compiler's cache cannot read
            graph = make_fx(lambda *tensors: self.function(*tensors), tracing_mode="symbolic")(*examples)
        return standalone_compile(graph, examples, options={"config_patches": options})


def _plain(x: Tensor) -> Tensor:
    """``x`` (dense, 0- or 1-D) on the same memory, no view and without a graph: each is a reason to compile again."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )
