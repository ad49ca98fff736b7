"""What torch.compile has to be told: so that its cache never gives a job the kernels of another machine state, and so
that its kernels for processors are as fast as they can be."""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache
from typing import Any

import torch

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


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs here: a C++ compiler, or a GPU with Triton."""
    if torch.cuda.is_available():
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)
